"""Both ways of computing an adapted layer against autograd on the written formula."""

import itertools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from srlora_pl.lowrank import kernels
from srlora_pl.lowrank.kernels import low_rank_linear, merge_on_the_fly, merging_pays, two_branches

KINDS = {"plain": (1, None), "fused": (3, None), "fused, part of it": (3, (0, 2)), "fused, one part": (3, (1,))}
SHAPES = {"1d": (), "2d": (40,), "3d": (5, 8), "4d": (2, 4, 5)}


def operands(kind, batch=(5, 8), dtype=torch.float64, in_=6, out=4, r=2):
    parts, adapted = KINDS[kind]
    generator = torch.Generator().manual_seed(0)
    p = () if parts == 1 else (parts if adapted is None else len(adapted),)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "x": normal(*batch, in_).requires_grad_(),
        "weight": normal(out * parts, in_),
        "bias": normal(out * parts).requires_grad_(),
        "A": normal(*p, r, in_).requires_grad_(),
        "B": normal(*p, out, r).requires_grad_(),
        "scaling": 1.7,
        "adapted": adapted,
    }


def formula(x, weight, bias, A, B, scaling, adapted):
    """x (W + s B A)^T + b, one part after the other."""
    A, B = (A, B) if A.dim() == 3 else (A[None], B[None])
    parts = list(weight.chunk(weight.shape[0] // B.shape[1]))
    for i, part in enumerate(range(len(parts)) if adapted is None else adapted):
        parts[part] = parts[part] + scaling * B[i] @ A[i]
    return x @ torch.cat(parts).T + (0 if bias is None else bias)


def gradients(function, given, upstream):
    leaves = [given[name] for name in ("x", "bias", "A", "B")]
    return torch.autograd.grad((function(**given) * upstream).sum(), leaves)


@pytest.mark.parametrize("function", [merge_on_the_fly, two_branches])
@pytest.mark.parametrize("batch", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_equal_the_formula(kind, batch, function):
    given = operands(kind, SHAPES[batch])
    expected = formula(**given)
    torch.testing.assert_close(function(**given), expected, rtol=0, atol=1e-13)
    upstream = torch.randn_like(expected)
    for mine, theirs in zip(gradients(function, given, upstream), gradients(formula, given, upstream), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("function", [merge_on_the_fly, two_branches])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind, function):
    given = operands(kind)
    assert torch.autograd.gradcheck(
        lambda x, bias, A, B: function(x, given["weight"], bias, A, B, 1.7, given["adapted"]),
        tuple(given[name] for name in ("x", "bias", "A", "B")),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_pairs_may_see_another_input(kind):
    given = operands(kind)
    other = torch.randn_like(given["x"], requires_grad=True)
    y = two_branches(**given, pairs_input=other)
    nothing = torch.zeros_like(given["weight"])
    expected = formula(**given | {"B": torch.zeros_like(given["B"])})
    expected = expected + formula(**given | {"x": other, "weight": nothing, "bias": None})
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-13)
    upstream = torch.randn_like(y)
    leaves = [given["x"], other, given["bias"], given["A"], given["B"]]
    mine, theirs = (torch.autograd.grad((each * upstream).sum(), leaves) for each in (y, expected))
    for one, other_one in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other_one, rtol=0, atol=1e-12)


@pytest.mark.parametrize("function", [merge_on_the_fly, two_branches])
@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=4)))
def test_only_what_is_asked_for_gets_a_gradient(needed, function):
    given = operands("fused")
    names = ("x", "bias", "A", "B")
    for name, need in zip(names, needed, strict=True):
        given[name] = given[name].detach().requires_grad_(need)
    y = function(**given)
    assert y.requires_grad == any(needed)
    if any(needed):
        y.sum().backward()
    assert [given[name].grad is not None for name in names] == list(needed)


@pytest.mark.parametrize("function", [merge_on_the_fly, two_branches])
def test_a_non_contiguous_input_and_no_bias(function):
    given = operands("plain") | {"bias": None}
    given["x"] = given["x"].detach().transpose(0, 1).requires_grad_()
    expected = formula(**given)
    y = function(**given)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-13)
    y.transpose(0, 1).pow(2).sum().backward()
    (theirs,) = torch.autograd.grad(expected.pow(2).sum(), given["x"])
    torch.testing.assert_close(given["x"].grad, theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast_it_is_nearer_to_the_exact_result_than_two_branches(kind, dtype):
    given = operands(kind, (16, 32), torch.float32, in_=64, out=48, r=8)
    given["A"].data *= 0.2
    exact = formula(**{k: v.double() if isinstance(v, torch.Tensor) else v for k, v in given.items()})
    upstream = torch.randn_like(exact)
    exact_grads = gradients(
        formula, {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in given.items()}, upstream
    )
    errors = {}
    for function in (merge_on_the_fly, two_branches):
        with torch.autocast("cpu", dtype=dtype):
            y = function(**given)
        assert y.dtype == dtype
        errors[function] = (y.double() - exact).norm() / exact.norm()
        leaves = [given[name] for name in ("x", "bias", "A", "B")]
        for grad, theirs in zip(torch.autograd.grad((y * upstream).sum(), leaves), exact_grads, strict=True):
            assert grad.dtype == torch.float32
            assert (grad.double() - theirs).norm() / theirs.norm() < 4 * torch.finfo(dtype).eps
    assert errors[merge_on_the_fly] <= errors[two_branches]
    assert errors[merge_on_the_fly] < torch.finfo(dtype).eps


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast_the_other_input_of_the_pairs_is_cast_like_the_first(kind):
    """Dropout gives the pairs an input in fp32 where the layer before was a norm."""
    given = operands(kind, (16, 32), torch.float32, in_=64, out=48, r=8)
    given["A"].data *= 0.2
    other = torch.randn_like(given["x"], requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = two_branches(**given, pairs_input=other)
    nothing = torch.zeros_like(given["weight"])
    exact = formula(**given | {"B": torch.zeros_like(given["B"])})
    exact = exact + formula(**given | {"x": other, "weight": nothing, "bias": None})
    assert y.dtype == torch.bfloat16
    eps = torch.finfo(torch.bfloat16).eps
    assert (y - exact).norm() / exact.norm() < eps
    upstream = torch.randn_like(exact)
    leaves = [given["x"], other, given["bias"], given["A"], given["B"]]
    mine, theirs = (torch.autograd.grad((each * upstream).sum(), leaves) for each in (y, exact))
    for one, other_one in zip(mine, theirs, strict=True):
        assert one.dtype == torch.float32
        assert (one - other_one).norm() / other_one.norm() < 4 * eps


def test_the_merged_weight_is_not_kept_for_the_backward_pass():
    given = operands("plain", (64,), torch.float32, in_=32, out=32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        merge_on_the_fly(**given)
    assert {t.data_ptr() for t in kept} == {given[name].data_ptr() for name in ("x", "weight", "A", "B")}


@pytest.mark.parametrize(
    ("rows", "dtype", "way"),
    [
        (999, None, "two_branches"),
        (2, torch.bfloat16, "two_branches"),
        (3, torch.bfloat16, "merged"),
    ],
)
def test_few_rows_take_two_branches(rows, dtype, way, monkeypatch, request):
    """in = 6, out = 4: merging pays from 24 / 10 rows on, and in half precision only."""
    if request.config.getoption("kernel"):
        pytest.skip("--kernel overrules it")
    called = []
    for name in ("two_branches", "merged"):
        original = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, n=name, f=original, **k: called.append(n) or f(*a, **k))
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        low_rank_linear(**operands("plain", (rows,), torch.float32))
    assert called == [way]


def test_on_a_cpu_wide_layers_are_never_merged():
    pays = [
        merging_pays(1576, out, in_, True, torch.device(device))
        for device in ("cpu", "cuda")
        for out, in_ in ((768, 768), (3072, 768), (384, 1536))
    ]
    assert pays == [False, False, True, True, True, True]


@pytest.mark.parametrize("size", [0.02, 0.3])
def test_two_branches_are_nearly_as_exact_in_half_precision_as_merging(size):
    """The smaller part is rounded first; the other way round it is 1.2 times the error."""
    generator = torch.Generator().manual_seed(0)
    x, weight, A = (torch.randn(*shape, generator=generator) for shape in ((300, 256), (192, 256), (8, 256)))
    given = {"x": x.bfloat16().float(), "weight": weight / 16, "bias": None, "A": A / 16}
    given |= {"B": torch.randn(192, 8, generator=generator) * size / 8**0.5, "scaling": 1.0, "adapted": None}
    exact = formula(**{name: value.double() if torch.is_tensor(value) else value for name, value in given.items()})
    errors = []
    for function in (merge_on_the_fly, two_branches):
        with torch.autocast("cpu", torch.bfloat16):
            errors.append((function(**given) - exact).norm())
    assert errors[1] < 1.1 * errors[0]


@pytest.mark.parametrize("function", [merge_on_the_fly, two_branches])
def test_inference_mode(function):
    given = operands("fused")
    with torch.inference_mode():
        torch.testing.assert_close(function(**given), formula(**given), rtol=0, atol=1e-13)


@pytest.mark.parametrize("function", [merge_on_the_fly, two_branches])
def test_activation_checkpointing(function):
    given = operands("fused")

    def again(**given):
        return checkpoint(lambda *leaves: function(**given), *given.values(), use_reentrant=False)

    upstream = torch.randn(5, 8, 12, dtype=torch.float64)
    for mine, theirs in zip(gradients(again, given, upstream), gradients(function, given, upstream), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("function", [merge_on_the_fly, two_branches, low_rank_linear])
def test_torch_compile_takes_it_without_a_graph_break(function, autocast):
    given = operands("fused", (60,), torch.float32)
    upstream = torch.randn(60, 12)

    def values(function):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = function(**given)
        return [y, *torch.autograd.grad((y * upstream).sum(), [given["A"], given["B"], given["bias"]])]

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for one, other in zip(values(compiled), values(function), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
