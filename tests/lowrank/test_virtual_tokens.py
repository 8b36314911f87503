"""Prompts and prefixes of causal language models: PEFT's own outputs, each text as alone, limits."""

import copy
import pickle

import pytest
import torch
import transformers
from torch import nn

from srlora_pl import UserError
from srlora_pl.lowrank import Adaptation, PrefixTuning, PromptTuning
from tests.helpers.causal import tiny_llama
from tests.helpers.encoders import BERT, build_encoder, folder
from tests.helpers.errors import mentions
from tests.helpers.toys import assert_same_state, optimizer_of, toy_net

peft = pytest.importorskip("peft")
IDS = torch.tensor([[5, 7, 9, 11, 3, 12, 4], [6, 8, 2, 77, 30, 31, 5]])
SMALL = {"vocab_size": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **SMALL)
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config)


def gemma2() -> nn.Module:
    """Windows of attention, keys of another size than hidden / heads, capped logits."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.Gemma2Config(**sizes, num_key_value_heads=2, head_dim=16, sliding_window=16, **SMALL)
    torch.manual_seed(0)
    return transformers.Gemma2ForCausalLM(config)


NETS = {"llama": tiny_llama, "gpt2": gpt2, "gemma2": gemma2}
PREFIX, PROMPT, PROJECTED = PrefixTuning(3), PromptTuning(3), PrefixTuning(3, projection=8)
METHODS = [PREFIX, PROMPT, PROJECTED]


def adapted(method, net="llama", dtype=torch.float32) -> Adaptation:
    torch.manual_seed(0)
    built = NETS[net]().to(dtype).eval()
    for module in built.modules():  # a small network of a small spread tells nothing apart
        if isinstance(module, nn.Linear):
            module.weight.data.mul_(8)
    adaptation = Adaptation(built, method)
    adaptation.start()
    adaptation.plan(2)
    return adaptation


def trained(adaptation: Adaptation) -> Adaptation:
    optimizer = optimizer_of(adaptation.net, lr=0.1)
    for step in (1, 2):
        optimizer.zero_grad()
        logits = adaptation.net(input_ids=IDS, use_cache=False).logits
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
        adaptation.before_optimizer(step)
        optimizer.step()
        adaptation.after_optimizer(step, optimizer)
    return adaptation


def in_peft(adaptation: Adaptation, net: str):
    """PEFT's network with the same vectors."""
    method, plain = adaptation.method, NETS[net]().eval()
    own = adaptation.net.state_dict()
    plain.load_state_dict({name: own[name] for name in plain.state_dict()})
    settings = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
    if isinstance(method, PromptTuning):
        theirs = peft.get_peft_model(plain, peft.PromptTuningConfig(**settings))
    else:
        if net == "gemma2":  # whose keys are not as wide as PEFT supposes
            settings |= {"token_dim": 2 * 16, "num_attention_heads": 2, "num_layers": 2}
        projected = method.projection is not None
        config = peft.PrefixTuningConfig(prefix_projection=projected, encoder_hidden_size=method.projection, **settings)
        theirs = peft.get_peft_model(plain, config)
    (adapter,) = adaptation.layers.values()
    theirs.prompt_encoder["default"].load_state_dict(adapter.default.state_dict())
    return theirs.eval()


def text_logits(net, method, **batch):
    logits = net(**batch).logits
    return logits[:, 3:] if isinstance(method, PromptTuning) and isinstance(net, peft.PeftModel) else logits


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("method", METHODS, ids=["prefix", "prompt", "projected"])
def test_outputs_and_gradients_are_those_of_peft(method, net):
    adaptation = adapted(method, net)
    theirs, mask = in_peft(adaptation, net), torch.ones_like(IDS)
    mask[1, 4:] = 0
    for batch in ({"use_cache": False}, {"attention_mask": mask}):
        ours = adaptation.net(input_ids=IDS, **batch).logits
        expected = text_logits(theirs, method, input_ids=IDS, **batch)
        torch.testing.assert_close(ours, expected, rtol=0, atol=2e-5)
    plain = NETS[net]().eval()
    own = adaptation.net.state_dict()
    plain.load_state_dict({name: own[name] for name in plain.state_dict()})
    assert not torch.allclose(plain(input_ids=IDS).logits, adaptation.net(input_ids=IDS).logits, atol=1e-3)
    (adapter,) = adaptation.layers.values()
    for network in (adaptation.net, theirs):
        text_logits(network, method, input_ids=IDS).square().mean().backward()
    for ours, name in zip(adapter.adapter_parameters(), adapter.adapter_names, strict=True):
        peer = theirs.prompt_encoder["default"].get_parameter(name.removeprefix("default."))
        torch.testing.assert_close(ours.grad, peer.grad, rtol=1e-3, atol=1e-5)
        assert ours.grad.any()


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("method", METHODS, ids=["prefix", "prompt", "projected"])
def test_hidden_states_are_those_of_the_text(method, net):
    adapted_net = adapted(method, net).net
    output = adapted_net.base_model(input_ids=IDS, use_cache=False, output_hidden_states=True)
    assert output.last_hidden_state.shape[:2] == IDS.shape
    assert {each.shape[1] for each in output.hidden_states} == {IDS.shape[1]}
    logits = adapted_net.lm_head(output.last_hidden_state)
    if net == "gemma2":
        logits = 30 * torch.tanh(logits / 30)
    torch.testing.assert_close(logits, adapted_net(input_ids=IDS).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("method", METHODS, ids=["prefix", "prompt", "projected"])
def test_a_batch_of_prompts_is_continued_as_each_alone_and_as_by_peft(method, net):
    adaptation = adapted(method, net)
    theirs = in_peft(adaptation, net)
    prompts = [IDS[0], IDS[1, :4]]
    padded = torch.stack([prompts[0], nn.functional.pad(prompts[1], (3, 0))])
    settings = {"max_new_tokens": 6, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    settings |= {"eos_token_id": None, "pad_token_id": 0}
    together = adaptation.net.generate(padded, attention_mask=(padded > 0).long(), **settings)
    for row, prompt in enumerate(prompts):
        alone = adaptation.net.generate(prompt[None], attention_mask=torch.ones_like(prompt)[None], **settings)
        for ours, one in zip(together.scores, alone.scores, strict=True):
            torch.testing.assert_close(ours[row], one[0], rtol=0, atol=2e-5)
        assert torch.equal(together.sequences[row, 7:], alone.sequences[0, len(prompt) :])
        # In one piece: PEFT 0.21's own generation does not agree with its forward pass under transformers 5.24.
        whole = text_logits(theirs, method, input_ids=alone.sequences)[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(torch.cat(alone.scores), whole, rtol=0, atol=2e-5)


@pytest.mark.parametrize("method", METHODS, ids=["prefix", "prompt", "projected"])
def test_only_the_vectors_train_and_without_them_it_is_the_pretrained_network(method, tmp_path):
    adaptation, before = adapted(method), adapted(method).net.state_dict()
    plain = copy.deepcopy(adaptation.net)
    trained(adaptation)
    for name, value in adaptation.net.state_dict().items():
        assert torch.equal(value, before[name]) != ("_encoder" in name), name
    assert adaptation.net.get_parameter(next(n for n in before if "_encoder" in n)).requires_grad
    after = adaptation.net(input_ids=IDS).logits
    with adaptation.disabled():
        pretrained = tiny_llama()
        pretrained.load_state_dict({name: plain.state_dict()[name] for name in pretrained.state_dict()})
        assert torch.equal(adaptation.net(input_ids=IDS).logits, pretrained.eval()(input_ids=IDS).logits)
    assert torch.equal(adaptation.net(input_ids=IDS).logits, after)
    adaptation.save(tmp_path)
    fresh = tiny_llama()
    fresh.load_state_dict(pretrained.state_dict())
    loaded = Adaptation.load(fresh.eval(), tmp_path)
    assert_same_state(loaded.net, adaptation.net)
    assert loaded.method.spec() == adaptation.method.spec()
    for copied in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert torch.equal(copied.net(input_ids=IDS).logits, after)
        for parameter in next(iter(copied.layers.values())).adapter_parameters():
            parameter.data.mul_(2)
        assert not torch.equal(copied.net(input_ids=IDS).logits, after)
        assert torch.equal(loaded.net(input_ids=IDS).logits, after)


@pytest.mark.parametrize("method", METHODS, ids=["prefix", "prompt", "projected"])
@pytest.mark.parametrize("autocast", [False, True])
def test_beside_bfloat16_the_vectors_train_in_float32(method, autocast):
    adaptation = adapted(method, dtype=torch.bfloat16)
    (adapter,) = adaptation.layers.values()
    before = [parameter.clone() for parameter in adapter.adapter_parameters()]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        trained(adaptation)
    for parameter, value in zip(adapter.adapter_parameters(), before, strict=True):
        assert parameter.dtype == torch.float32
        assert not torch.equal(parameter, value)


@pytest.mark.parametrize("method", [PREFIX, PROMPT], ids=["prefix", "prompt"])
def test_packed_samples_are_refused(method):
    net, positions = adapted(method).net, torch.tensor([[0, 1, 2, 0, 1, 2, 3]] * 2)
    with pytest.raises(UserError, match=mentions(type(method).__name__, "packed", "data.padding", "buckets")):
        net.base_model(input_ids=IDS, position_ids=positions, use_cache=False)


def test_activation_checkpointing_is_for_prompts_alone():
    prompt = adapted(PROMPT)
    expected = trained(copy.deepcopy(prompt))
    prompt.net.gradient_checkpointing_enable({"use_reentrant": False})
    prompt.net.train()
    assert_same_state(trained(prompt).net, expected.net)
    prefix = adapted(PREFIX)
    prefix.net.gradient_checkpointing_enable({"use_reentrant": False})
    assert prefix.net(input_ids=IDS).logits.isfinite().all()
    prefix.net.train()
    with pytest.raises(UserError, match=mentions("PrefixTuning", "activation_checkpointing", "PromptTuning")):
        trained(prefix)


@pytest.mark.parametrize("net", ["toy", "encoder", "encoder and decoder"])
def test_a_prefix_needs_a_causal_language_model(net, tmp_path):
    if net == "toy":
        built: nn.Module = toy_net()
    elif net == "encoder":
        built = build_encoder(folder(tmp_path, BERT), 2, {"pretrained": False})
    else:
        config = transformers.T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=64)
        built = transformers.T5ForConditionalGeneration(config)
    with pytest.raises(UserError, match=mentions("PrefixTuning", "causal language model", type(built).__name__)):
        Adaptation(built, PREFIX)


@pytest.mark.parametrize("method", [PREFIX, PROMPT], ids=["prefix", "prompt"])
def test_one_network_has_one(method):
    net = adapted(method).net
    with pytest.raises(UserError, match="already"):
        Adaptation(net, method)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tokens": 0}, ["method.tokens", "0"]),
        ({"projection": 0}, ["method.projection", "0"]),
        ({"init": "words"}, ["method.init", "'words'", "zero"]),
    ],
)
def test_bad_values_are_refused(settings, words):
    with pytest.raises(UserError, match=mentions(*words)):
        PrefixTuning(**settings)
