"""GaLore beyond the contract: its moments are those of the gradient along a few directions."""

import pytest
import torch
from torch import Tensor, nn

from srlora_pl import UserError
from srlora_pl.lowrank import Adaptation, GaLore
from srlora_pl.lowrank.methods.galore import GaLoreOptimizer
from tests.helpers.contract_program import batches, loss_of
from tests.helpers.errors import mentions
from tests.helpers.toys import toy_net

SHAPES = [(9, 5), (5, 9), (6, 6)]


def problem(shape: tuple[int, int]):
    """A weight, and a loss of it with gradients of full rank."""
    generator = torch.Generator().manual_seed(0)
    W, goal = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    curvature = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.1
    return W, lambda weight: (curvature * (weight - goal).square()).sum() + torch.tanh(weight).sum()


def galore(W: Tensor, rank: int, form: str = "adamw", **settings) -> tuple[nn.Parameter, GaLoreOptimizer]:
    parameter = nn.Parameter(W.clone())
    group = {"params": [parameter], "rank": rank, "parts": 1, "scale": 1.0, "gap": 1000, "lr": 0.01, **settings}
    return parameter, GaLoreOptimizer([group], form)


def steps(loss, parameter: nn.Parameter, optimizer, count: int, of=lambda weight: weight) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        loss(of(parameter)).backward()
        optimizer.step()


@pytest.mark.parametrize("shape", SHAPES)
def test_at_full_rank_it_is_adamw_on_the_rotated_weight(shape) -> None:
    W, loss = problem(shape)
    ours, optimizer = galore(W, min(shape), weight_decay=0.1)
    steps(loss, ours, optimizer, 25)
    P = optimizer.state[ours]["projection"][0]
    tall = shape[0] >= shape[1]
    Z = nn.Parameter(W @ P.T if tall else P.T @ W)
    adamw = torch.optim.AdamW([Z], lr=0.01, weight_decay=0.1)
    steps(loss, Z, adamw, 25, of=lambda z: z @ P if tall else P @ z)
    torch.testing.assert_close(ours.detach(), (Z @ P if tall else P @ Z).detach(), rtol=0, atol=1e-12)
    plain = nn.Parameter(W.clone())
    steps(loss, plain, torch.optim.AdamW([plain], lr=0.01, weight_decay=0.1), 25)
    assert float((plain - ours).detach().abs().max()) > 0.01  # which is not AdamW on the weight


@pytest.mark.parametrize("shape", SHAPES)
def test_at_full_rank_sgd_is_sgd(shape) -> None:
    W, loss = problem(shape)
    ours, optimizer = galore(W, min(shape), "sgd")
    steps(loss, ours, optimizer, 25)
    plain = nn.Parameter(W.clone())
    steps(loss, plain, torch.optim.SGD([plain], lr=0.01, momentum=0.9), 25)
    torch.testing.assert_close(ours.detach(), plain.detach(), rtol=0, atol=1e-13)


class Reference:
    """One matrix, written down as in the paper (Algorithm 2); moments are not projected anew."""

    def __init__(self, W: Tensor, rank: int, scale: float, gap: int, lr: float, decay: float) -> None:
        self.W, self.rank, self.scale, self.gap, self.lr, self.decay = W.clone(), rank, scale, gap, lr, decay
        self.m = self.v = 0.0
        self.t = 0

    def step(self, G: Tensor) -> None:
        tall = G.shape[0] >= G.shape[1]
        if self.t % self.gap == 0:
            U, _, Vh = torch.linalg.svd(G, full_matrices=False)
            self.P = Vh[: self.rank] if tall else U[:, : self.rank]
        self.t += 1
        g = G @ self.P.T if tall else self.P.T @ G
        self.m, self.v = 0.9 * self.m + 0.1 * g, 0.999 * self.v + 0.001 * g * g
        u = self.m / (1 - 0.9**self.t) / ((self.v / (1 - 0.999**self.t)).sqrt() + 1e-8)
        back = u @ self.P if tall else self.P @ u
        self.W = (1 - self.lr * self.decay) * self.W - self.lr * self.scale * back


def adapted(**settings) -> Adaptation:
    return Adaptation(toy_net(dtype=torch.float64), GaLore(**{"rank": 2, **settings}), ["head"])


def test_twenty_steps_equal_a_plain_loop() -> None:
    """A fused qkv is three matrices; what is not chosen trains as with torch's AdamW."""
    adaptation = adapted(scale=0.5, update_gap=7, rank_pattern={"qkv": 3}, exclude_modules=["fc2"])
    net, lr, decay = adaptation.net, 0.01, 0.1
    optimizer = adaptation.method.optimizer(adaptation, adaptation.param_groups(lr, decay))
    adaptation.attach(optimizer, 20)
    parts = {"qkv": 3, "proj": 1, "fc1": 1}
    chosen = {f"blocks.{i}.{name}.weight": (parts[name], 3 if name == "qkv" else 2) for i in (0, 1) for name in parts}
    references = {
        name: [Reference(W, rank, 0.5, 7, lr, decay) for W in net.get_parameter(name).detach().chunk(number)]
        for name, (number, rank) in chosen.items()
    }
    others = {name: nn.Parameter(p.detach().clone()) for name, p in net.named_parameters() if name not in chosen}
    matrices, vectors = ([p for p in others.values() if (p.ndim > 1) == wide] for wide in (True, False))
    plain = torch.optim.AdamW([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], lr, weight_decay=decay)
    for batch in batches(20, torch.float64):
        optimizer.zero_grad()
        loss_of(net, batch).backward()
        for name, each in references.items():
            for reference, G in zip(each, net.get_parameter(name).grad.chunk(len(each)), strict=True):
                reference.step(G)
        for name, p in others.items():
            p.grad = net.get_parameter(name).grad.clone()
        plain.step()
        optimizer.step()
        for name, each in references.items():
            W = torch.cat([reference.W for reference in each])
            torch.testing.assert_close(net.get_parameter(name).detach(), W, rtol=0, atol=1e-9, msg=name)
        for name, p in others.items():
            torch.testing.assert_close(net.get_parameter(name), p, rtol=0, atol=1e-9, msg=name)


def test_its_moments_are_as_many_as_the_paper_says() -> None:
    adaptation = adapted()
    optimizer = adaptation.method.optimizer(adaptation, adaptation.param_groups(0.01))
    loss_of(adaptation.net, batches(1, torch.float64)[0]).backward()
    optimizer.step()
    states = [state for state in optimizer.state.values() if "projection" in state]
    kept = sum(value.numel() for state in states for name, value in state.items() if name != "step")
    assert kept == 2 * sum(2 * 2 * max(shape) + 2 * min(shape) for shape in [(12, 12)] * 4 + [(20, 12), (12, 20)])


def test_a_new_choice_of_directions_leaves_the_moments() -> None:
    W, loss = problem((9, 5))
    kept, renewed = galore(W, 2), galore(W, 2, gap=3)
    for parameter, optimizer in (kept, renewed):
        steps(loss, parameter, optimizer, 3)
        parameter.grad = torch.zeros_like(W)
        parameter.grad[0, 0] = 1.0
        optimizer.step()
    ours, theirs = (optimizer.state[parameter] for parameter, optimizer in (kept, renewed))
    assert not torch.equal(ours["projection"], theirs["projection"])
    gradients = [
        torch.tensor([[1.0], *[[0.0]] * 8]).double() * state["projection"][0, :, 0] for state in (ours, theirs)
    ]
    before = [(state["exp_avg"][0] - 0.1 * g) / 0.9 for state, g in zip((ours, theirs), gradients, strict=True)]
    torch.testing.assert_close(*before, rtol=0, atol=1e-12)


def test_directions_along_which_there_is_no_gradient_stay_unused() -> None:
    parameter, optimizer = galore(torch.ones(6, 4).double(), 3)
    parameter.grad = torch.outer(torch.arange(6.0), torch.ones(4)).double()
    optimizer.step()
    P = optimizer.state[parameter]["projection"][0]
    assert P[0].abs().allclose(torch.full((4,), 0.5).double())
    assert not P[1:].any()


def test_a_gradient_of_0_moves_nothing_and_one_that_is_not_finite_is_seen_afterwards() -> None:
    parameter, optimizer = galore(torch.ones(6, 4).double(), 3)
    parameter.grad = torch.zeros(6, 4).double()
    optimizer.step()
    assert torch.equal(parameter.detach(), torch.ones(6, 4).double())
    parameter, optimizer = galore(torch.ones(6, 4).double(), 3)
    parameter.grad = torch.full((6, 4), float("nan")).double()
    optimizer.step()
    assert parameter.isnan().all()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"scale": 0.0}, ["method.scale", "0.0"]),
        ({"update_gap": 0}, ["method.update_gap", "0"]),
        ({"update_gap": 1.5}, ["method.update_gap", "1.5"]),
        ({"rank": 0}, ["method.rank", "0"]),
        ({"rank": 13}, ["rank 13", "12"]),
        ({"target_modules": ["qvk"]}, ["target_modules", "'qvk'"]),
        ({"target_modules": ["query", "fc1"]}, ["blocks.0.qkv", "GaLore", "name 'qkv'"]),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, words) -> None:
    with pytest.raises(UserError, match=mentions(*words)):
        adapted(**settings)


def test_another_optimizer_is_refused() -> None:
    adaptation = adapted()
    with pytest.raises(UserError, match=mentions("GaLore", "AdamW", "param_groups")):
        adaptation.attach(torch.optim.AdamW(adaptation.net.parameters()), 5)
    with pytest.raises(UserError, match=mentions("'lion'", "GaLoreOptimizer", "adamw and sgd")):
        adaptation.method.optimizer(adaptation, adaptation.param_groups(0.1), "lion")
