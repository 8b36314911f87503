"""LoRA-Pro beyond the contract: its changes are the closest ones to those of a full weight."""

import pytest
import torch
from torch import Tensor

from srlora_pl import UserError
from srlora_pl.lowrank import Adaptation, LoRAPro
from srlora_pl.lowrank.methods.lora_pro import LoRAProOptimizer, Pair, _grams
from tests.helpers.contract_program import batches, loss_of
from tests.helpers.errors import mentions
from tests.helpers.toys import toy_net

OUT, IN, RANK, S = 9, 7, 3, 1.7


@pytest.fixture
def A() -> Tensor:
    return torch.randn(RANK, IN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture
def B() -> Tensor:
    return torch.randn(OUT, RANK, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.fixture
def G() -> Tensor:
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def pair_of(A: Tensor, B: Tensor) -> Pair:
    values, vectors = torch.linalg.eigh(_grams(A, B))
    return Pair(A, B, S, values, vectors)


def changes(A: Tensor, B: Tensor, G: Tensor, extra: float = 0.0) -> tuple[Tensor, Tensor]:
    """h_A and h_B with the best X, or with one that differs from it by ``extra`` times the identity."""
    pair, g_A = pair_of(A, B), S * B.T @ G
    h_A, h_B = pair.closest(g_A, S * G @ A.T)
    X = pair.shift(g_A) + extra * torch.eye(RANK, dtype=A.dtype)
    return h_A + X @ A, h_B - B @ X


@pytest.mark.parametrize("extra", [0.0, 0.3])
def test_the_change_is_the_best_that_A_and_B_can_make(A, B, G, extra) -> None:
    h_A, h_B = changes(A, B, G, extra)
    P_B, P_A = B @ torch.linalg.pinv(B), torch.linalg.pinv(A) @ A
    best = G - (torch.eye(OUT) - P_B) @ G @ (torch.eye(IN) - P_A)
    torch.testing.assert_close(S * (B @ h_A + h_B @ A), best, rtol=0, atol=1e-7)


def test_it_descends(A, B, G) -> None:
    h_A, h_B = changes(A, B, G)
    along = ((S * B.T @ G) * h_A).sum() + ((S * G @ A.T) * h_B).sum()
    assert float(along) == pytest.approx(float((S * (B @ h_A + h_B @ A)).square().sum()), rel=1e-7)


def test_of_all_best_changes_it_is_nearest_to_the_gradients(A, B, G) -> None:
    def distance(extra: float) -> float:
        h_A, h_B = changes(A, B, G, extra)
        return float((h_A - S * B.T @ G).square().sum() + (h_B - S * G @ A.T).square().sum())

    step = 1e-4
    assert distance(0) < min(distance(step), distance(-step))
    assert (distance(step) - distance(-step)) / (2 * step) == pytest.approx(0, abs=1e-4)
    X, g_A = pair_of(A, B).shift(S * B.T @ G), S * B.T @ G
    torch.testing.assert_close(
        B.T @ B @ X + X @ A @ A.T, -torch.linalg.inv(B.T @ B) @ g_A @ A.T / S**2, rtol=0, atol=1e-7
    )


def test_B_at_0_moves_alone(A, G) -> None:
    """h_B = (1/s^2) g_B (A A^T)^-1, and A stays."""
    h_A, h_B = changes(A, torch.zeros(OUT, RANK, dtype=A.dtype), G)
    assert not h_A.any()
    torch.testing.assert_close(h_B, G @ A.T @ torch.linalg.inv(A @ A.T) / S, rtol=0, atol=1e-7)


def test_at_full_rank_sgd_is_that_of_the_weight() -> None:
    """Up to the second order in the learning rate."""
    generator, lr = torch.Generator().manual_seed(0), 1e-6
    A, B, W_grad = (torch.randn(*shape, generator=generator).double() for shape in ((5, 5), (8, 5), (8, 5)))
    pair = [torch.nn.Parameter(A.clone()), torch.nn.Parameter(B.clone())]
    pair[0].grad, pair[1].grad = S * B.T @ W_grad, S * W_grad @ A.T
    groups = [{"params": pair, "rank": 5, "scaling": S, "lr": lr, "weight_decay": 0.0}]
    LoRAProOptimizer(groups, "sgd", momentum=0.0).step()
    moved = S * (pair[1] @ pair[0] - B @ A).detach()
    torch.testing.assert_close(moved / lr, -W_grad, rtol=0, atol=1e-3)


class Reference:
    """A and B (one matrix), AdamW on the gradient of the full weight, written down as in the paper."""

    def __init__(self, A: Tensor, B: Tensor, s: float, lr: float, decay: float) -> None:
        self.A, self.B, self.s, self.lr, self.decay = A.clone(), B.clone(), s, lr, decay
        self.m = self.v = torch.zeros(len(B), A.shape[1], dtype=A.dtype)
        self.t = 0

    def h(self, g_A: Tensor, g_B: Tensor, best: bool) -> tuple[Tensor, Tensor]:
        A, B, eye = self.A, self.B, torch.eye(len(self.A), dtype=self.A.dtype)
        BB, AA = B.T @ B + 1e-8 * eye, A @ A.T + 1e-8 * eye
        h_A = torch.linalg.inv(BB) @ g_A / self.s**2
        h_B = (torch.eye(len(B)) - B @ torch.linalg.inv(BB) @ B.T) @ g_B @ torch.linalg.inv(AA) / self.s**2
        if not best:
            return h_A, h_B
        system = torch.kron(BB, eye) + torch.kron(eye, AA)  # of X by rows
        X = torch.linalg.solve(system, -(h_A @ A.T).flatten()).view_as(eye)
        return h_A + X @ A, h_B - B @ X

    def step(self, g_A: Tensor, g_B: Tensor) -> None:
        self.t += 1
        h_A, h_B = self.h(g_A, g_B, best=False)
        g = self.s * (self.B @ h_A + h_B @ self.A)
        self.m, self.v = 0.9 * self.m + 0.1 * g, 0.999 * self.v + 0.001 * g * g
        d = self.m / (1 - 0.9**self.t) / ((self.v / (1 - 0.999**self.t)).sqrt() + 1e-8)
        h_A, h_B = self.h(self.s * self.B.T @ d, self.s * d @ self.A.T, best=True)
        self.A = (1 - self.lr * self.decay) * self.A - self.lr * h_A
        self.B = (1 - self.lr * self.decay) * self.B - self.lr * h_B


def test_twenty_steps_equal_a_plain_loop() -> None:
    """With ranks of their own for some layers, and rsLoRA's scaling; the head trains as with torch's AdamW."""
    net, lr, decay = toy_net(dtype=torch.float64), 0.003, 0.1
    adaptation = Adaptation(net, LoRAPro(rank=3, rank_pattern={"fc1": 2}, use_rslora=True), ["head"])
    groups = adaptation.param_groups(lr, decay, head_lr=0.01)
    optimizer = adaptation.method.optimizer(adaptation, groups)
    head = torch.nn.Linear(12, 3).double()
    head.load_state_dict(net.head.state_dict())
    plain = torch.optim.AdamW([{"params": [head.weight]}, {"params": [head.bias], "weight_decay": 0}], 0.01)
    plain.param_groups[0]["weight_decay"] = decay
    references = [Reference(m.A, m.B, m.scaling, lr, decay) for m in adaptation.matrices]
    adaptation.attach(optimizer, 20)
    for batch in batches(20, torch.float64):
        optimizer.zero_grad()
        loss_of(net, batch).backward()
        for matrix, reference in zip(adaptation.matrices, references, strict=True):
            reference.step(*(matrix.of(getattr(matrix.layer, name).grad) for name in matrix.layer.adapter_names))
        head.weight.grad, head.bias.grad = net.head.weight.grad.clone(), net.head.bias.grad.clone()
        plain.step()
        optimizer.step()
        for matrix, reference in zip(adaptation.matrices, references, strict=True):
            torch.testing.assert_close(matrix.A, reference.A, rtol=0, atol=1e-10)
            torch.testing.assert_close(matrix.B, reference.B, rtol=0, atol=1e-10)
    torch.testing.assert_close(net.head.state_dict(), head.state_dict(), rtol=0, atol=1e-12)


def begun(**options) -> tuple[Adaptation, LoRAProOptimizer]:
    adaptation = Adaptation(toy_net(), LoRAPro(rank=2, **options), ["head"])
    optimizer = adaptation.method.optimizer(adaptation, adaptation.param_groups(0.01))
    adaptation.attach(optimizer, 5)
    return adaptation, optimizer


def train(adaptation, optimizer, scaler=None, steps: int = 3, poisoned: int = -1) -> None:
    for step, batch in enumerate(batches(steps, torch.float32)):
        optimizer.zero_grad()
        loss = loss_of(adaptation.net, batch)
        (scaler.scale(loss) if scaler else loss).backward()
        if step == poisoned:
            adaptation.net.head.weight.grad[0, 0] = float("inf")
        if scaler:
            scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(adaptation.net.parameters(), 0.1)
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()


def test_gradients_are_unscaled_and_clipped_before_it() -> None:
    plain, scaled = begun(), begun()
    train(*plain)
    train(*scaled, torch.amp.GradScaler("cpu", init_scale=2.0**8))
    for ours, theirs in zip(plain[0].matrices, scaled[0].matrices, strict=True):
        torch.testing.assert_close(ours.B, theirs.B, rtol=0, atol=1e-6)


def test_an_overflow_leaves_its_state_alone() -> None:
    adaptation, optimizer = begun()
    train(adaptation, optimizer, torch.amp.GradScaler("cpu", init_scale=2.0**8), steps=3, poisoned=2)
    steps = {float(state["step"]) for state in optimizer.state.values()}
    assert steps == {2.0}
    assert all(value.isfinite().all() for state in optimizer.state.values() for value in state.values())


def test_it_keeps_two_moments_of_each_full_weight() -> None:
    adaptation, optimizer = begun()
    train(adaptation, optimizer)
    kept = sum(v.numel() for p, state in optimizer.state.items() for k, v in state.items() if k.startswith("exp"))
    head = sum(p.numel() for p in adaptation.net.head.parameters())
    assert kept == 2 * (head + sum(m.shape[0] * m.shape[1] for m in adaptation.matrices))


def test_pairs_without_a_gradient_stay() -> None:
    adaptation, optimizer = begun()
    before = [matrix.A.clone() for matrix in adaptation.matrices]
    optimizer.step()
    assert all(torch.equal(matrix.A, A) for matrix, A in zip(adaptation.matrices, before, strict=True))


def test_what_it_cannot_be_trained_with_is_refused() -> None:
    adaptation = Adaptation(toy_net(), LoRAPro(rank=2))
    with pytest.raises(UserError, match=mentions("'torch.optim.NAdam'", "LoRAProOptimizer", "adamw and sgd")):
        adaptation.method.optimizer(adaptation, adaptation.param_groups(0.1), "torch.optim.NAdam")
    other = torch.optim.AdamW(p for p in adaptation.net.parameters() if p.requires_grad)
    with pytest.raises(UserError, match=mentions("LoRAPro", "AdamW", "param_groups")):
        adaptation.attach(other, 5)
    with pytest.raises(UserError, match=mentions("lr_ratio", "16", "LoRAPro")):
        LoRAPro(lr_ratio=16.0)
