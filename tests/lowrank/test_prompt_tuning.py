"""Prompt tuning: PEFT's own outputs and gradients, copies of the network, limits, and what is refused."""

import copy
import pickle
import sys

import lightning as L
import pytest
import torch
from torch import nn

from srlora_pl import UserError
from srlora_pl.lowrank import Adaptation, PromptTuning
from srlora_pl.models import encoders
from tests.helpers.encoders import BERT, DEBERTA, Data, build_encoder, folder, samples
from tests.helpers.errors import mentions
from tests.helpers.models import encoder_folder, text_task
from tests.helpers.texts import WORDS
from tests.helpers.toys import assert_same_state, optimizer_of, toy_net

peft = pytest.importorskip("peft")
ROBERTA = BERT | {"model_type": "roberta", "type_vocab_size": 1, "pad_token_id": 1}
SEEN = torch.tensor([[5, 7, 9, 11, 3], [6, 8, 2, 0, 0]])
BATCH = {"input_ids": SEEN, "attention_mask": (SEEN > 0).long()}


def encoder(tmp_path, config, **options):
    torch.manual_seed(0)
    return build_encoder(
        folder(tmp_path, config | {"initializer_range": 0.3}), 2, {"pretrained": False, **options}
    ).eval()


def adapted(net, seed: int = 0, **settings) -> Adaptation:
    torch.manual_seed(seed)
    adaptation = Adaptation(net, PromptTuning(**{"tokens": 3, **settings}), encoders.head_names(net))
    adaptation.start()
    adaptation.plan(4)
    return adaptation


def trained(adaptation: Adaptation, steps: int = 2) -> Adaptation:
    optimizer = optimizer_of(adaptation.net)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        nn.functional.cross_entropy(adaptation.net(**BATCH).logits, torch.tensor([0, 1])).backward()
        adaptation.before_optimizer(step)
        optimizer.step()
        adaptation.after_optimizer(step, optimizer)
    return adaptation


@pytest.mark.parametrize("config", [BERT, DEBERTA, ROBERTA], ids=lambda config: config["model_type"])
def test_outputs_and_gradients_are_those_of_peft(config, tmp_path) -> None:
    net = encoder(tmp_path, config)
    plain, batch = copy.deepcopy(net), dict(BATCH)
    if config is BERT:
        batch["token_type_ids"] = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 0, 0]])
    adaptation = adapted(net)
    settings = {"task_type": "SEQ_CLS", "num_virtual_tokens": 3}
    theirs = peft.get_peft_model(plain, peft.PromptTuningConfig(**settings)).eval()
    weight, own = theirs.prompt_encoder.default.embedding.weight, net.prompt_encoder.default.embedding.weight
    weight.data.copy_(own.data)
    for network in (net, theirs):
        nn.functional.cross_entropy(network(**batch).logits, torch.tensor([0, 1])).backward()
    torch.testing.assert_close(net(**batch).logits, theirs(**batch).logits, rtol=0, atol=1e-6)
    torch.testing.assert_close(own.grad, weight.grad, rtol=0, atol=1e-6)
    assert own.grad.any()
    assert [
        n for n, p in net.named_parameters() if p.requires_grad and not n.startswith(tuple(adaptation.trainable))
    ] == ["prompt_encoder.default.embedding.weight"]
    assert own.numel() == 3 * 16


def test_only_prompt_and_head_move_and_without_them_it_is_the_pretrained_network(tmp_path) -> None:
    net = encoder(tmp_path, BERT)
    before = copy.deepcopy(net)
    adaptation = trained(adapted(net))
    heads = tuple(adaptation.trainable)
    for name, value in before.named_parameters():
        assert torch.equal(value, net.get_parameter(name)) != name.startswith(heads), name
    for head in heads:
        before.get_submodule(head).load_state_dict(net.get_submodule(head).state_dict())
    after = net(**BATCH).logits
    with adaptation.disabled():
        assert torch.equal(net(**BATCH).logits, before(**BATCH).logits)
    assert torch.equal(net(**BATCH).logits, after)
    assert not torch.equal(before(**BATCH).logits, after)


def test_a_state_goes_on_where_it_was(tmp_path) -> None:
    whole = trained(adapted(encoder(tmp_path, BERT)))
    whole.save(tmp_path / "saved")
    loaded = Adaptation.load(encoder(tmp_path, BERT), tmp_path / "saved")
    assert_same_state(loaded.net, whole.net)
    assert loaded.method.spec() == whole.method.spec() == {
        "class_path": "srlora_pl.PromptTuning",
        "init_args": {"tokens": 3, "init": "vocabulary"},
    }  # fmt: skip
    assert_same_state(trained(loaded).net, trained(whole).net)


def test_copies_have_a_prompt_of_their_own(tmp_path) -> None:
    adaptation = trained(adapted(encoder(tmp_path, BERT)))
    expected = adaptation.net(**BATCH).logits
    for copied in (copy.deepcopy(adaptation), pickle.loads(pickle.dumps(adaptation))):
        assert torch.equal(copied.net(**BATCH).logits, expected)
        assert copied.layers["prompt_encoder"] is copied.net.prompt_encoder
        copied.net.prompt_encoder.default.embedding.weight.data.zero_()
        assert not torch.equal(copied.net(**BATCH).logits, expected)
        assert torch.equal(adaptation.net(**BATCH).logits, expected)


@pytest.mark.parametrize("init", ["vocabulary", "random"])
def test_the_start_depends_on_the_seed_alone(init, tmp_path) -> None:
    nets = [adapted(encoder(tmp_path, BERT), seed, init=init).net for seed in (1, 1, 2)]
    one, same, other = (net.prompt_encoder.default.embedding.weight for net in nets)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    words = nets[0].get_input_embeddings().weight
    assert all((words == row).all(1).any() for row in one) == (init == "vocabulary")


def test_texts_may_be_shorter_by_the_prompt(tmp_path) -> None:
    backbone = encoder_folder(tmp_path / "bert", BERT)
    task = text_task(backbone, PromptTuning(tokens=3))
    assert task.max_tokens == 64 - 3
    ids = torch.full((1, 61), 7)
    assert task(ids, torch.ones_like(ids)).shape == (1, 2)
    assert text_task(encoder_folder(tmp_path / "deberta", DEBERTA), PromptTuning(tokens=3)).max_tokens is None


@pytest.mark.parametrize("config", [BERT, DEBERTA], ids=lambda config: config["model_type"])
def test_a_task_trains_with_it_and_its_file_is_small(config, tmp_path) -> None:
    backbone = encoder_folder(tmp_path / "backbone", config)
    task = text_task(backbone, PromptTuning(tokens=3), lr=0.05, fast_attention=config is DEBERTA)
    rows = samples(16, torch.arange(16) % 2)
    data = Data([{**row, "input_ids": row["input_ids"] % len(WORDS)} for row in rows])
    trainer = L.Trainer(max_steps=8, accelerator="cpu", logger=False, enable_checkpointing=False, barebones=True)
    before = copy.deepcopy(task.state_dict())
    trainer.fit(task, data.train_dataloader())
    moved = {name for name, value in task.state_dict().items() if not torch.equal(value, before[name])}
    assert "net.prompt_encoder.default.embedding.weight" in moved
    trainer.save_checkpoint(tmp_path / "8.ckpt")
    loaded = type(task).load_from_checkpoint(tmp_path / "8.ckpt")
    assert_same_state(loaded.eval(), task.eval())
    content = torch.load(tmp_path / "8.ckpt", weights_only=True)
    assert not any("encoder.layer" in name for name in content["state_dict"])


def test_it_cannot_be_merged(tmp_path) -> None:
    adaptation = adapted(encoder(tmp_path, BERT))
    for refuse in (adaptation.merge, adaptation.merged_copy):
        with pytest.raises(UserError, match=mentions("Prompt", "cannot be merged")):
            refuse()


def test_networks_without_words_are_refused() -> None:
    with pytest.raises(UserError, match=mentions("PromptTuning", "ToyNet", "encoder")):
        Adaptation(toy_net(), PromptTuning())


T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
BLOOM = {"n_embed": 16, "n_layer": 1, "n_head": 2}


@pytest.mark.parametrize("kind", ["gpt2", "bert", "t5", "bloom"])
def test_decoders_are_refused(kind, tmp_path) -> None:
    config = BERT | {"model_type": kind, "is_decoder": kind == "bert", "n_embd": 16} | T5 | BLOOM
    with pytest.raises(UserError, match=mentions("PromptTuning", "decoder")):
        adapted(encoder(tmp_path, config))


def test_bad_values_and_a_missing_library_are_refused(monkeypatch) -> None:
    with pytest.raises(UserError, match=mentions("method.tokens", 0)):
        PromptTuning(0)
    with pytest.raises(UserError, match=mentions("method.init", "'words'", "vocabulary")):
        PromptTuning(init="words")  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"PromptTuning needs .* pip install peft"):
        PromptTuning()
