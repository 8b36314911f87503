"""Attention with whole products in its backward pass, against fp64 and against torch's own."""

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import checkpoint_seq
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from srlora_pl import ImageClassifier, SRLoRA
from srlora_pl.tasks.attention import MOST_TOKENS, WholeProductAttention


def operands(dtype, tokens=40, spread=1.0, samples=2, heads=3, width=16):
    generator = torch.Generator().manual_seed(0)
    fused = torch.randn(samples, tokens, 3, heads, width, generator=generator)
    fused[:, :, :2] *= spread
    upstream = torch.randn(samples, heads, tokens, width, generator=generator)
    query, key, value = (each.to(dtype) for each in fused.permute(2, 0, 3, 1, 4))
    return [each.requires_grad_() for each in (query, key, value)], upstream.to(dtype)


def gradients(leaves, upstream, **options):
    return torch.autograd.grad(F.scaled_dot_product_attention(*leaves, **options), leaves, upstream)


def errors(found, exact):
    return [((one.double() - other).norm() / other.norm()).item() for one, other in zip(found, exact, strict=True)]


@pytest.mark.parametrize("spread", [1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_errors_of_gradients_are_of_the_size_of_torchs(dtype, spread):
    leaves, upstream = operands(dtype, tokens=150, spread=spread, width=64)
    exact = gradients([each.detach().double().requires_grad_() for each in leaves], upstream.double())
    own = gradients(leaves, upstream)
    with WholeProductAttention():
        mine = gradients(leaves, upstream)
    found, known = errors(mine, exact), errors(own, exact)
    assert sum(found) < 1.1 * sum(known)
    assert all(one < 1.5 * other for one, other in zip(found, known, strict=True))


def grad_fn(leaves, **options):
    with WholeProductAttention():
        return type(F.scaled_dot_product_attention(*leaves, **options).grad_fn).__name__


def test_the_forward_pass_is_torchs_own():
    leaves, _ = operands(torch.bfloat16)
    assert grad_fn(leaves) == "_WholeProductsBackward"
    with WholeProductAttention():
        mine = F.scaled_dot_product_attention(*leaves)
    assert torch.equal(mine, F.scaled_dot_product_attention(*leaves))


PLAIN = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}


@pytest.mark.parametrize("option", PLAIN)
def test_masks_dropout_and_the_like_are_left_to_torch(option):
    leaves, _ = operands(torch.bfloat16)
    other = {"attn_mask": torch.ones(40, 40, dtype=torch.bool), "dropout_p": 0.5, "scale": 0.1}
    assert grad_fn(leaves, **PLAIN) == "_WholeProductsBackward"
    assert grad_fn(leaves, **PLAIN | {option: other.get(option, True)}) != "_WholeProductsBackward"


def test_full_precision_long_inputs_and_evaluation_are_left_to_torch():
    assert grad_fn(operands(torch.float32)[0]) != "_WholeProductsBackward"
    assert grad_fn(operands(torch.bfloat16, MOST_TOKENS)[0]) == "_WholeProductsBackward"
    assert grad_fn(operands(torch.bfloat16, MOST_TOKENS + 1)[0]) != "_WholeProductsBackward"
    with torch.no_grad():
        assert grad_fn(operands(torch.bfloat16)[0]) == "NoneType"


@pytest.mark.parametrize("which", range(3))
def test_one_head_or_sample_for_all_and_other_widths_are_left_to_torch(which):
    leaves, _ = operands(torch.bfloat16)
    for part in ((slice(None), [0]), ([0],), (..., slice(8)) if which == 2 else ([0],)):
        other = [each.detach()[part].requires_grad_() if i == which else each for i, each in enumerate(leaves)]
        upstream = torch.randn_like(F.scaled_dot_product_attention(*other))
        with WholeProductAttention():
            mine = gradients(other, upstream)
        for one, own in zip(mine, gradients(other, upstream), strict=True):
            assert torch.equal(one, own)


def test_operands_may_have_names():
    leaves, upstream = operands(torch.bfloat16)
    names = dict(zip(("query", "key", "value"), leaves, strict=True))
    with WholeProductAttention():
        named = F.scaled_dot_product_attention(**names)
        assert type(named.grad_fn).__name__ == "_WholeProductsBackward"
        mine = gradients(leaves, upstream)
    for one, other in zip(torch.autograd.grad(named, leaves, upstream), mine, strict=True):
        assert torch.equal(one, other)


def test_keys_and_values_may_be_fewer_than_queries():
    (query, key, value), upstream = operands(torch.bfloat16)
    leaves = [query, *(each.detach()[:, :, :7].requires_grad_() for each in (key, value))]
    exact = gradients([each.detach().double().requires_grad_() for each in leaves], upstream.double())
    with WholeProductAttention():
        mine = gradients(leaves, upstream)
    assert max(errors(mine, exact)) < 2 * torch.finfo(torch.bfloat16).eps


@pytest.fixture
def classifier(monkeypatch):
    net = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=3)
    monkeypatch.setattr("srlora_pl.tasks.image.find_head", lambda *arguments: (net, None))
    module = ImageClassifier("toy", 3, SRLoRA(rank=2), {"pretrained": False})
    module.adaptation.start()
    return module


def trained_gradients(module):
    kept = {}
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t) is None or t, lambda t: t
        ),
    ):
        logits = module(images)
    module.zero_grad()
    logits.float().pow(2).sum().backward()
    return [p.grad.clone() for p in module.parameters() if p.grad is not None], sum(t.nbytes for t in kept.values())


def test_an_image_classifier_trains_with_it_and_keeps_no_more(classifier, monkeypatch):
    mine, kept = trained_gradients(classifier)
    monkeypatch.setattr("srlora_pl.tasks.attention.MOST_TOKENS", 0)
    own, kept_by_torch = trained_gradients(classifier)
    assert 0 < max(errors(mine, own)) < 0.05
    assert kept <= kept_by_torch


@pytest.mark.parametrize(
    ("how", "compiled"),
    [
        ("of the net", False),
        ("of the net", True),
        ("of a stage", False),
        ("of a stage", True),
        ("around blocks", False),
    ],
)
def test_activation_checkpointing_gives_the_same_gradients(how, compiled, classifier, monkeypatch):
    if how == "around blocks":
        blocks = [checkpoint_wrapper(block) for block in classifier.net.blocks]
        monkeypatch.setattr(classifier.net, "blocks", torch.nn.Sequential(*blocks))
    if compiled:
        for block in classifier.net.blocks:
            block.compile(fullgraph=True, backend="aot_eager")
    monkeypatch.setattr("srlora_pl.tasks.attention.MOST_TOKENS", 0)
    plain, _ = trained_gradients(classifier)
    monkeypatch.setattr("srlora_pl.tasks.attention.MOST_TOKENS", MOST_TOKENS)
    if how != "around blocks":
        classifier.net.set_grad_checkpointing()
    if how == "of a stage":
        stage = classifier.net.blocks
        stage.grad_checkpointing, classifier.net.grad_checkpointing = True, False
        monkeypatch.setattr(stage, "forward", lambda x: checkpoint_seq(stage, x))
    again, _ = trained_gradients(classifier)
    for one, other in zip(again, plain, strict=True):
        assert torch.equal(one, other)


def test_torch_compile_takes_it_without_a_graph_break(classifier):
    eager, _ = trained_gradients(classifier)
    for block in classifier.net.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    compiled, _ = trained_gradients(classifier)
    assert max(errors(compiled, eager)) < 2 * torch.finfo(torch.bfloat16).eps
