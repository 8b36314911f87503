import pytest
import timm
import torch
import torchvision
import transformers
from torch import nn
from torch.nn.utils import weight_norm

from srlora_pl import UserError
from srlora_pl.lowrank import Adaptation, LoRA, LowRankLinear, SRLoRA
from srlora_pl.lowrank.targets import block_and_kind, repeated_blocks
from tests.helpers.errors import mentions
from tests.helpers.toys import toy_net


def adapted(net, **options):
    adaptation = Adaptation(net, LoRA(**{"rank": 2, "alpha": 2.0, **options}))
    return {name.rpartition(".")[2] if name.startswith("blocks.0") else name for name in names(adaptation)}


def names(adaptation):
    return [matrix.name for matrix in adaptation.matrices]


def pair_parameters(adaptation):
    return sum(p.numel() for layer in adaptation.layers.values() for p in (layer.lora_A, layer.lora_B))


def test_vit_base_has_the_papers_number_of_parameters_and_keeps_it_over_switches():
    net = timm.create_model("vit_base_patch16_224", depth=12)
    adaptation = Adaptation(net, SRLoRA(rank=8))
    assert pair_parameters(adaptation) == 1_327_104
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == 1_327_104
    assert len(adaptation.matrices) == 12 * 6
    assert {layer.parts for name, layer in adaptation.layers.items() if name.endswith("qkv")} == {3}


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", {"qkv[q]", "qkv[k]", "qkv[v]", "proj", "fc1", "fc2"}),
        (["qkv"], {"qkv[q]", "qkv[k]", "qkv[v]"}),
        (["query", "value"], {"qkv[q]", "qkv[v]"}),
        (["v_proj", "fc1"], {"qkv[v]", "fc1"}),
        (r"fc\d", {"fc1", "fc2"}),
        ([r"blocks\.0\.proj", "fc2"], {"proj", "fc2"}),
        (["head", "fc1"], {"fc1", "head"}),
    ],
)
def test_names_regular_expressions_and_parts_of_a_fused_qkv(targets, expected):
    assert adapted(toy_net(depth=1), target_modules=targets) == expected


def test_excluded_modules_and_layer_ranges():
    assert adapted(toy_net(depth=1), exclude_modules=["fc.", "qkv"]) == {"proj"}
    adaptation = Adaptation(toy_net(depth=5), LoRA(rank=2, target_modules=["fc1"], layers="0,3-4"))
    assert names(adaptation) == ["blocks.0.fc1", "blocks.3.fc1", "blocks.4.fc1"]
    assert names(Adaptation(toy_net(depth=3), LoRA(rank=2, target_modules=["fc1"], layers=1))) == ["blocks.1.fc1"]


def test_rank_and_alpha_patterns_take_the_first_match():
    method = LoRA(rank=2, alpha=6.0, rank_pattern={r"blocks\.1\.fc1": 3, "fc1": 4}, alpha_pattern={"proj": 1.0})
    layers = Adaptation(toy_net(), method).layers
    assert [layers[f"blocks.{i}.fc1"].rank for i in (0, 1)] == [4, 3]
    assert layers["blocks.1.fc1"].scaling == 6.0 / 3
    assert layers["blocks.0.proj"].scaling == 1.0 / 2
    assert layers["blocks.0.fc2"].scaling == 3.0
    assert Adaptation(toy_net(), LoRA(rank=4, alpha=6.0, use_rslora=True)).layers["blocks.0.proj"].scaling == 3.0


@pytest.mark.parametrize("parts", [(0,), (1, 2), (0, 1, 2)])
def test_a_fused_layer_equals_three_plain_ones(parts):
    torch.manual_seed(0)
    fused = LowRankLinear(nn.Linear(6, 15), rank=2, scaling=1.5, parts=3, adapted=parts)
    nn.init.normal_(fused.lora_A)
    nn.init.normal_(fused.lora_B)
    x = torch.randn(4, 7, 6)
    expected = []
    for part, (W, b) in enumerate(zip(fused.weight.chunk(3), fused.bias.chunk(3), strict=True)):
        if part in parts:
            i = parts.index(part)
            W = W + 1.5 * fused.lora_B[i] @ fused.lora_A[i]
        expected.append(x @ W.T + b)
    torch.testing.assert_close(fused(x), torch.cat(expected, dim=-1))
    torch.testing.assert_close(fused(x), nn.functional.linear(x, fused.merged_weight(), fused.bias))


@pytest.mark.parametrize(
    ("name", "projections", "fused"),
    [
        ("vit_tiny_patch16_224", 12, 12),
        ("maxvit_rmlp_pico_rw_256", 22, 0),  # head by head
        ("tiny_vit_5m_224", 10, 0),
        ("gcvit_xxtiny", 12, 6),  # every other block holds no query of its own
    ],
)
def test_parts_are_told_apart_only_where_they_lie_one_after_the_other(name, projections, fused):
    with torch.device("meta"):
        net = timm.create_model(name)
    layers = Adaptation(net, LoRA(rank=1, target_modules=["qkv"])).layers
    assert len(layers) == projections
    assert sum(layer.parts == 3 for layer in layers.values()) == fused
    with torch.device("meta"):
        net = timm.create_model(name)
    if fused:
        layers = Adaptation(net, LoRA(rank=1, target_modules=["query"])).layers
        assert [(layer.parts, layer.adapted) for layer in layers.values()] == [(3, (0,))] * fused
    else:
        with pytest.raises(UserError, match=mentions("target_modules", "'query'")):
            Adaptation(net, LoRA(rank=1, target_modules=["query"]))


def test_a_language_models_projection_by_heads_stays_whole():
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    net = transformers.GPTNeoXModel(transformers.GPTNeoXConfig(**shape, vocab_size=20))
    layers = Adaptation(net, LoRA(rank=1)).layers
    assert {layer.parts for layer in layers.values()} == {1}
    assert "layers.1.attention.query_key_value" in layers


def test_adapter_dropout_acts_on_the_pairs_only_and_only_in_training():
    torch.manual_seed(0)
    layer = LowRankLinear(nn.Linear(50, 3), rank=2, scaling=1.0, dropout=0.5)
    nn.init.normal_(layer.lora_A)
    x = torch.randn(9, 50)
    base = nn.functional.linear(x, layer.weight, layer.bias)
    assert torch.equal(layer.train()(x), base)  # B = 0: what is dropped never reaches the frozen branch
    nn.init.normal_(layer.lora_B)
    torch.manual_seed(3)
    dropped = layer(x)
    torch.manual_seed(3)
    expected = base + nn.functional.dropout(x, 0.5) @ layer.lora_A.T @ layer.lora_B.T
    torch.testing.assert_close(dropped, expected)
    torch.testing.assert_close(layer.eval()(x), base + x @ layer.lora_A.T @ layer.lora_B.T)


def test_trainable_names_train_and_all_else_is_frozen():
    net = toy_net()
    Adaptation(net, LoRA(rank=2), trainable=["head"])
    trainable = {name for name, p in net.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[2] for name in trainable} == {"lora_A", "lora_B", "weight", "bias"}
    assert {name for name in trainable if "lora" not in name} == {"head.weight", "head.bias"}
    with pytest.raises(UserError, match=mentions("'haed'", "'head'")):
        Adaptation(toy_net(), LoRA(rank=2), trainable="haed")


def test_a_head_of_blocks_trains_whole_and_gets_no_pairs():
    net = toy_net()
    net.head = nn.Sequential(toy_net().blocks[0], net.head)
    adaptation = Adaptation(net, LoRA(rank=2), trainable="head")
    assert not any(name.startswith("head") for name in adaptation.layers)
    assert all(parameter.requires_grad for parameter in net.head.parameters())


@pytest.mark.parametrize(
    ("trainable", "new", "words"),
    [
        ([], ["head"], ["head", "'head' to exclude_modules"]),
        (["head"], [], ["head", "'head' to exclude_modules"]),
        (["blocks.0.fc1.bias"], [], ["'blocks.0.fc1.bias'", "blocks.0.fc1"]),
    ],
)
def test_nothing_is_adapted_that_is_new_or_trains_whole(trainable, new, words):
    with pytest.raises(UserError, match=mentions(*words)):
        Adaptation(toy_net(), LoRA(rank=2, target_modules=["head", "fc1"]), trainable, new=new)


def test_a_network_may_be_a_list_of_blocks():
    net = nn.Sequential(*toy_net().blocks)
    assert [m.name for m in Adaptation(net, LoRA(rank=2, target_modules=["fc1", "query"])).matrices] == [
        "0.qkv[q]", "0.fc1", "1.qkv[q]", "1.fc1",
    ]  # fmt: skip
    assert len(Adaptation(nn.Sequential(*toy_net().blocks), LoRA(rank=2)).matrices) == 12


def test_a_backbone_and_a_head_one_after_the_other_are_no_blocks():
    net = toy_net()
    body = nn.Sequential(net.embed, nn.Sequential(*net.blocks))
    adaptation = Adaptation(nn.Sequential(body, nn.Sequential(nn.LayerNorm(12), net.head)), LoRA(rank=2))
    assert {layer.rpartition(".")[0] for layer in adaptation.layers} == {"0.1.0", "0.1.1"}


SMALL = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
FAMILIES = {
    "deberta-v2": transformers.DebertaV2Config(
        **SMALL, relative_attention=True, pos_att_type=["p2c", "c2p"], share_att_key=True
    ),
    "bert": transformers.BertConfig(**SMALL),
    "roberta": transformers.RobertaConfig(**SMALL),
    "electra": transformers.ElectraConfig(**SMALL, embedding_size=16),
    "distilbert": transformers.DistilBertConfig(vocab_size=50, dim=32, n_layers=2, n_heads=2, hidden_dim=64),
    "modernbert": transformers.ModernBertConfig(
        **SMALL, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_text_encoders_answer_to_the_same_names(family):
    def build():
        return transformers.AutoModelForSequenceClassification.from_config(FAMILIES[family])

    everything = Adaptation(build(), LoRA(rank=2)).matrices
    roles = {
        role: {m.name for m in Adaptation(build(), LoRA(rank=2, target_modules=[role])).matrices}
        for role in ("query", "key", "value", "attention_output", "fc1", "fc2")
    }
    assert all(len(found) == 2 for found in roles.values()), roles
    assert {m.name for m in everything} == set().union(*roles.values())
    assert not any("pooler" in m.name or "classifier" in m.name for m in everything)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(toy_net().blocks[i] for i in range(2))
        self.blocks[1].fc1.weight = self.blocks[0].fc1.weight


def half():
    return toy_net(dtype=torch.float16)


class Special(nn.Linear):
    """What it computes is its own affair."""


def special():
    net = toy_net()
    net.blocks[0].fc1 = Special(12, 20)
    return net


def wide():
    net = toy_net()
    net.blocks[1].qkv = nn.Linear(20, 3 * 12)
    return nn.ModuleDict({"blocks": net.blocks[1:]})


def normed():
    net = toy_net()
    weight_norm(net.blocks[1].fc1)
    return net


def twice():
    net = toy_net()
    Adaptation(net, LoRA(rank=2))
    return net


@pytest.mark.parametrize(
    ("build", "options", "words"),
    [
        (toy_net, {"target_modules": ["quary"]}, ["'quary'", "fc1", "qkv"]),
        (toy_net, {"target_modules": ["prof"]}, ["'prof'", "'proj'"]),
        (toy_net, {"exclude_modules": ["fc3"]}, ["exclude_modules", "'fc3'", "did you mean"]),
        (toy_net, {"rank_pattern": {"prj": 2}}, ["rank_pattern", "'prj'", "'proj'"]),
        (toy_net, {"alpha_pattern": {"prj": 2.0}}, ["alpha_pattern", "'prj'", "'proj'"]),
        (toy_net, {"layers": "7-9"}, ["layers='7-9'"]),
        (toy_net, {"layers": "a-b"}, ["layers", "'a-b'"]),
        (toy_net, {"target_modules": ["fc("]}, ["'fc('", "expression"]),
        (toy_net, {"rank": 13}, ["rank 13", "12", "blocks.0.qkv"]),
        (toy_net, {"rank": 0}, ["rank", "0"]),
        (toy_net, {"alpha": 0.0}, ["alpha", "0"]),
        (toy_net, {"dropout": 1.0}, ["dropout", "1"]),
        (toy_net, {"rank": 2.5}, ["rank", "2.5", "whole number"]),
        (half, {}, ["blocks.0.qkv", "torch.float16"]),
        (special, {}, ["blocks.0.fc1", "Special", "nn.Linear"]),
        (wide, {"target_modules": "qkv", "rank": 13}, ["rank 13", "12", "blocks.0.qkv"]),
        (normed, {}, ["blocks.1.fc1", "weight_norm"]),
        (twice, {}, ["adapters already"]),
        (Tied, {}, ["blocks.0.fc1", "tied", "blocks.1.fc1"]),
        (lambda: nn.Sequential(nn.Linear(3, 3)), {}, ["repeated", "blocks"]),
        (
            lambda: timm.create_model("resnet18"),
            {"target_modules": ["conv1"]},
            ["conv1", "Conv2d"],
        ),
        (
            lambda: transformers.GPT2Model(transformers.GPT2Config(vocab_size=9, n_embd=8, n_layer=2, n_head=1)),
            {},
            ["h.0.attn.c_attn", "Conv1D"],
        ),
        (
            lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2),
            {},
            ["layers.0.self_attn.out_proj", "MultiheadAttention"],
        ),
        (
            lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2),
            {"exclude_modules": ["out_proj"]},
            ["linear1", "TransformerEncoderLayer"],
        ),
        (
            lambda: torchvision.models.VisionTransformer(32, 16, 2, 2, 8, 16),
            {},
            ["out_proj", "MultiheadAttention"],
        ),
        (
            lambda: timm.create_model("beit_base_patch16_224", depth=1),
            {},
            ["qkv", "Attention"],
        ),
        (
            lambda: timm.create_model("eva02_tiny_patch14_224", depth=1),
            {},
            ["qkv", "EvaAttention"],
        ),
        (
            lambda: timm.create_model("swinv2_tiny_window8_256", depths=(1, 1)),
            {"exclude_modules": ["cpb_mlp.*"]},
            ["qkv", "WindowAttention"],
        ),
    ],
)
def test_what_cannot_be_adapted_is_refused_by_name(build, options, words):
    with pytest.raises(UserError, match=mentions(*words)) as error:
        Adaptation(build(), LoRA(**{"rank": 2, **options}))
    assert "\n" not in str(error.value)


def test_lists_and_single_names_mean_the_same():
    lists = LoRA(rank=2, exclude_modules=["fc1"], layers=[0, 2])
    names = LoRA(rank=2, exclude_modules="fc1", layers="0,2")
    chosen = [Adaptation(toy_net(depth=3), method).layers.keys() for method in (lists, names)]
    assert chosen[0] == chosen[1] == {f"blocks.{i}.{kind}" for i in (0, 2) for kind in ("qkv", "proj", "fc2")}


def test_separate_qkv_bias_is_called_and_so_can_be_adapted():
    net = timm.create_model("beit_base_patch16_224", depth=1, embed_dim=24, num_heads=2, num_classes=2)
    net.blocks[0].attn.qkv_bias_separate = True
    adaptation = Adaptation(net, LoRA(rank=2))
    net(torch.randn(1, 3, 224, 224)).sum().backward()
    adaptation.before_optimizer(1)
    assert adaptation.layers["blocks.0.attn.qkv"].lora_B.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("blocks.3.attn.qkv[q]", (3, "attn.qkv[q]")),
        ("deberta.encoder.layer.11.output.dense", (11, "output.dense")),
        ("stages.1.blocks.2.mlp.fc1", (1, "blocks.2.mlp.fc1")),
        ("fc1", (None, "fc1")),
        ("norm1.proj", (None, "norm1.proj")),
    ],
)
def test_block_and_kind(name, place):
    assert block_and_kind(name) == place


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vit_base_patch16_224", [f"blocks.{i}" for i in range(12)]),
        (
            "swin_tiny_patch4_window7_224",
            [f"layers.{i}.blocks.{j}" for i, n in enumerate((2, 2, 6, 2)) for j in range(n)],
        ),
    ],
)
def test_repeated_blocks_are_the_innermost(name, expected):
    with torch.device("meta"):
        assert repeated_blocks(timm.create_model(name)) == expected


def test_a_stack_of_blocks_may_be_the_network_itself():
    assert repeated_blocks(nn.Sequential(*toy_net().blocks)) == ["0", "1"]
