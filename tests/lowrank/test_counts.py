"""How many numbers each method trains beside the head, on the networks of the paper; nothing is allocated."""

import pytest
import timm
import torch
from torch import nn
from transformers import DebertaV2Config, DebertaV2ForSequenceClassification, LlamaConfig, LlamaForCausalLM

from srlora_pl import lowrank
from srlora_pl.lowrank import Adaptation, Method
from srlora_pl.lowrank.methods import REGISTRY

# Both have per block four matrices of 768 x 768, one of 3072 x 768 and one of 768 x 3072, and 12 blocks: in + out is
# 165,888 in all, out 82,944.
OF_ALL = {"vit": 85_875_556, "deberta": 184_423_682}
HEADS = {"vit": 768 * 100 + 100, "deberta": 768 * 2 + 2 + 768**2 + 768}

EXPECTED: dict[str, tuple[dict, int]] = {
    **dict.fromkeys(("LoRA", "LoRAGA", "LoRAPro", "PiSSA", "SRLoRA", "ReLoRA", "DyLoRA"), ({"rank": 8}, 1_327_104)),
    "LoRAXS": ({"rank": 8}, 4_608),
    "LoRASB": ({"rank": 25}, 45_000),
    "DoRA": ({"rank": 8}, 1_410_048),
    "AdaLoRA": ({"rank": 8}, 1_991_520),  # 12 triplets to begin with
    "VeRA": ({"rank": 256}, 101_376),
    "TiedLoRA": ({"rank": 8}, 194_112),
    "HydraLoRA": ({"rank": 8, "heads": 3}, 2_903_040),
    "BitFit": ({}, 102_912),
    "LinearProbe": ({}, 0),
}


def network(name: str) -> tuple[nn.Module, list[str]]:
    with torch.device("meta"):
        if name == "vit":
            return timm.create_model("vit_base_patch16_224", num_classes=100), ["head"]
        config = DebertaV2Config(
            vocab_size=128_100,
            hidden_size=768,
            num_hidden_layers=12,
            num_attention_heads=12,
            intermediate_size=3072,
            relative_attention=True,
            position_buckets=256,
            norm_rel_ebd="layer_norm",
            share_att_key=True,
            pos_att_type=["p2c", "c2p"],
            type_vocab_size=0,
            position_biased_input=False,
            max_relative_positions=-1,
        )
        return DebertaV2ForSequenceClassification(config), ["classifier", "pooler"]


def trained_beside_the_head(name: str, method: Method) -> int:
    net, head = network(name)
    Adaptation(net, method, head)
    return sum(p.numel() for p in net.parameters() if p.requires_grad) - HEADS[name]


@pytest.mark.parametrize("name", ["vit", "deberta"])
@pytest.mark.parametrize("kind", EXPECTED)
def test_on_both_networks_it_trains_as_many_numbers(kind: str, name: str) -> None:
    settings, expected = EXPECTED[kind]
    assert trained_beside_the_head(name, getattr(lowrank, kind)(**settings)) == expected


@pytest.mark.parametrize("name", ["vit", "deberta"])
@pytest.mark.parametrize("kind", ["Full", "GaLore"])
def test_everything_is_as_much_as_the_network_has(kind: str, name: str) -> None:
    assert trained_beside_the_head(name, getattr(lowrank, kind)()) + HEADS[name] == OF_ALL[name]


def test_a_prompt_is_as_many_vectors_as_it_has_tokens() -> None:
    assert trained_beside_the_head("deberta", lowrank.PromptTuning(tokens=20)) == 20 * 768


@pytest.mark.parametrize("name", ["vit", "deberta"])
def test_a_bottleneck_is_two_matrices_and_two_biases_at_two_places_of_a_block(name: str) -> None:
    expected = 12 * 2 * (2 * 768 * 64 + 768 + 64)
    assert trained_beside_the_head(name, lowrank.Bottleneck()) == expected


def test_a_tuner_of_peft_trains_what_peft_counts() -> None:
    config = {"peft_type": "IA3", "target_modules": ["qkv", "fc2"], "feedforward_modules": ["fc2"]}
    assert trained_beside_the_head("vit", lowrank.Peft(config)) == 12 * (3 * 768 + 3072)


def test_prefix_tuning_trains_a_key_and_a_value_for_each_token_layer_and_head() -> None:
    """In the shape of Llama-3.2-3B: 28 layers with 8 heads of keys and values, each 128 wide."""
    config = LlamaConfig(
        hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24, num_key_value_heads=8
    )
    with torch.device("meta"):
        net = LlamaForCausalLM(config)
    Adaptation(net, lowrank.PrefixTuning(20))
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == 20 * 28 * 2 * 8 * 128


def test_every_method_is_counted() -> None:
    counted = {*EXPECTED, "Full", "GaLore", "PromptTuning", "PrefixTuning", "Bottleneck", "Peft"}
    assert {kind.__name__ for kind in REGISTRY} == counted
