"""Two halves of a float32 weight: exact to the bit, whatever the values and however often they change."""

import copy

import pytest
import torch
from torch import Tensor, nn

from srlora_pl import UserError
from srlora_pl.lowrank import Adaptation, ReLoRA, SRLoRA
from srlora_pl.lowrank.ledger import Update
from srlora_pl.lowrank.weights import Halves, join, split
from tests.helpers.errors import mentions
from tests.helpers.toys import ToyNet, toy_batches, toy_net

STEPS, SWITCHES = 200, 100
OPTIMIZERS = {"sgd": (torch.optim.SGD, {"lr": 0.005, "momentum": 0.9}), "adamw": (torch.optim.AdamW, {"lr": 0.02})}


def of_bits(*bits: int) -> Tensor:
    return torch.tensor([each - (each >> 31 << 32) for each in bits], dtype=torch.int32).view(torch.float32)


@pytest.mark.parametrize(
    ("W", "upper"),
    [
        (of_bits(0x00000000, 0x80000000), of_bits(0x00000000, 0x80000000)),
        (of_bits(0x00000001, 0x807FFFFF), of_bits(0x00000000, 0x80800000)),
        (of_bits(0x3F808000, 0x3F818000, 0xBF808000), of_bits(0x3F810000, 0x3F820000, 0xBF810000)),
        (of_bits(0x3F807FFF, 0x3F808001), of_bits(0x3F800000, 0x3F810000)),
        (of_bits(0x7F7F7FFF, 0xFF7F0000), of_bits(0x7F7F0000, 0xFF7F0000)),
    ],
    ids=["zeros", "subnormals", "ties", "beside a tie", "huge values"],
)
def test_the_upper_half_is_the_nearest_bfloat16_and_both_are_the_value(W, upper):
    half, rest = split(W)
    assert (half.dtype, rest.dtype) == (torch.bfloat16, torch.int16)
    assert torch.equal(half.float().view(torch.int32), upper.view(torch.int32))
    assert torch.equal(join(half, rest).view(torch.int32), W.view(torch.int32))


def test_values_of_all_sizes_come_back_to_the_bit():
    bits = torch.randint(-(2**31), 2**31, (2**20,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    W = bits.view(torch.float32)
    W = W[W.isfinite()]
    half, rest = split(W)
    assert torch.equal(join(half, rest).view(torch.int32), W.view(torch.int32))
    far = W.abs() > torch.finfo(torch.bfloat16).max  # beyond the largest bfloat16 both roundings are infinite
    nearest = W.bfloat16()
    ties = bits[bits.view(torch.float32).isfinite()] & 0xFFFF == 0x8000
    assert torch.equal(half[~ties & ~far], nearest[~ties & ~far])


def test_a_bfloat16_weight_has_no_rest():
    W = torch.randn(100).bfloat16()
    half, rest = split(W.float())
    assert torch.equal(half, W)
    assert not rest.any()


# --- a run of 100 switches


def net_of(dtype: torch.dtype) -> ToyNet:
    """The same values in either type."""
    return toy_net(dim=104, hidden=106, depth=1).bfloat16().to(dtype)


class Fed:
    """A run that is given the gradient of each step."""

    def __init__(self, dtype: torch.dtype, kind: str) -> None:
        torch.manual_seed(0)
        self.net = net_of(dtype)
        self.net.head.float()
        self.adaptation = Adaptation(self.net, SRLoRA(rank=2, alpha=4.0, target_rank=103), ["head"])
        self.trained = [p for p in self.net.parameters() if p.requires_grad]
        optimizer, settings = OPTIMIZERS[kind]
        self.optimizer = optimizer(self.trained, **settings)
        self.adaptation.start()
        self.adaptation.plan(STEPS)

    def step(self, step: int, gradients: list[Tensor]) -> None:
        for parameter, gradient in zip(self.trained, gradients, strict=True):
            parameter.grad = gradient
        self.adaptation.before_optimizer(step)
        self.optimizer.step()
        self.adaptation.after_optimizer(step, self.optimizer)

    def state(self) -> list[Tensor]:
        """Pairs, averages, choices, histories and what the optimizer remembers."""
        return [*tensors_in([self.trained, self.adaptation.state_dict(), self.optimizer.state_dict()])]

    def weights(self) -> list[Tensor]:
        return [matrix.weight.clone() for matrix in self.adaptation.matrices]


def tensors_in(node):
    if isinstance(node, Tensor):
        yield node
    elif isinstance(node, dict | list | tuple):
        for each in node.values() if isinstance(node, dict) else node:
            yield from tensors_in(each)


@pytest.fixture(scope="module", params=OPTIMIZERS)
def recorded(request):
    """A run in float32: its optimizer, its gradients by step, and what it ended with."""
    run, gradients = Fed(torch.float32, request.param), []
    for step, (x, y) in enumerate(toy_batches(STEPS), start=1):
        loss = nn.functional.cross_entropy(run.net(x), y)
        gradients.append(torch.autograd.grad(loss, run.trained))
        run.step(step, [each.clone() for each in gradients[-1]])
    assert run.adaptation.controller.switches_done == SWITCHES
    return request.param, gradients, run.state(), run.weights()


def fed_with(kind: str, gradients: list) -> Fed:
    run = Fed(torch.bfloat16, kind)
    for step, each in enumerate(gradients, start=1):
        run.step(step, [gradient.clone() for gradient in each])
    return run


def test_fed_the_same_gradients_it_is_the_run_in_float32_to_the_bit(recorded):
    kind, gradients, state, weights = recorded
    run = fed_with(kind, gradients)
    assert {layer.weight.dtype for layer in run.adaptation.layers.values()} == {torch.bfloat16}
    for ours, theirs in zip([*run.state(), *run.weights()], [*state, *weights], strict=True):
        assert torch.equal(ours, theirs)


def test_without_the_rest_it_is_another_weight(recorded, monkeypatch):
    kind, gradients, _, weights = recorded
    monkeypatch.setattr(Halves, "copy_", lambda self, W: self.weight.copy_(W))
    off = [(a - b).norm() / b.norm() for a, b in zip(fed_with(kind, gradients).weights(), weights, strict=True)]
    assert min(off) > 1e-3


# --- what else becomes of the halves


def changed(net: nn.Module) -> Adaptation:
    """ReLoRA on ``net`` with a weight that no bfloat16 holds."""
    adaptation = Adaptation(net, ReLoRA(rank=2, restarts=1))
    for matrix in adaptation.matrices:
        B, A = (torch.randn(n, m) for n, m in ((matrix.shape[0], 2), (2, matrix.shape[1])))
        adaptation.add(matrix, B, A, 0.3)
    return adaptation


def joined(adaptation: Adaptation) -> list[Tensor]:
    return [matrix.weight.clone() for matrix in adaptation.matrices]


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_the_state_dict_holds_both_halves_for_either_kind():
    net = toy_net().bfloat16()
    adaptation = changed(net)
    halves, dense = Adaptation(toy_net(1).bfloat16(), ReLoRA(rank=2, restarts=1)), changed(toy_net(1))
    for other in (halves, dense):
        other.net.load_state_dict(net.state_dict())
        assert_equal(joined(other), joined(adaptation))
    halves.net.load_state_dict(dense.net.state_dict())
    assert_equal(joined(halves), joined(adaptation))


def test_a_plain_state_has_no_rest():
    adaptation = changed(toy_net().bfloat16())
    whole = adaptation.net.state_dict()
    assert any(whole[f"{name}.rest"].any() for name in adaptation.layers)
    adaptation.net.load_state_dict({name: value for name, value in whole.items() if not name.endswith("rest")})
    assert_equal(joined(adaptation), [matrix.frozen.weight.float() for matrix in adaptation.matrices])


@pytest.mark.parametrize("merged", [False, True])
def test_in_float32_the_weight_is_all_of_it(merged):
    adaptation = changed(toy_net().bfloat16())
    before = joined(adaptation)
    if merged:
        adaptation.merge()
    adaptation.net.float()
    adaptation.unmerge()
    assert_equal(joined(adaptation), before)
    assert {layer.weight.dtype for layer in adaptation.layers.values()} == {torch.float32}


def test_a_copy_has_a_rest_of_its_own():
    adaptation = changed(toy_net().bfloat16())
    before = joined(adaptation)
    other = copy.deepcopy(adaptation)
    matrix = other.matrices[0]
    matrix.frozen.add_(Update(torch.ones(matrix.shape[0], 1), torch.ones(1, matrix.shape[1]), 1e-4))
    assert_equal(joined(adaptation), before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(value):
    net = toy_net().bfloat16()
    net.blocks[1].fc1.weight.data[3, 4] = value
    with pytest.raises(UserError, match=mentions("blocks.1.fc1", "NaN or infinity")):
        Adaptation(net, SRLoRA(rank=4, target_rank=12))
