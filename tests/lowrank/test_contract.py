"""The contract that every registered method keeps, without a test of its own; two methods made in tests keep it too."""

import copy
import io
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from torch import nn
from torch.func import functional_call

from srlora_pl import UserError
from srlora_pl.lowrank import Adaptation, Adapter, LowRankLinear
from srlora_pl.lowrank.delta import change
from srlora_pl.lowrank.methods import (
    AdaLoRA,
    BitFit,
    Bottleneck,
    DoRA,
    Full,
    GaLore,
    HydraLoRA,
    LinearProbe,
    LoRASB,
    LoRAXS,
    TiedLoRA,
    VeRA,
)
from srlora_pl.lowrank.targets import block_and_kind
from srlora_pl.models import peft_folder
from tests.helpers.contract_program import batches, loss_of, parallel, sources_of, trained_in_one_process
from tests.helpers.methods import IA3, METHODS, OFT, Bottlenecks, Core, PeftLoRA, made, trainer_of
from tests.helpers.toys import ToyNet, toy_net

STEPS, RANK = 12, 4
pytestmark = pytest.mark.filterwarnings("ignore:target_rank 128 is above", "ignore:.*no whole number of switches")
# How many numbers train besides the head, of adapted ``matrices``; where it is not r (out + in) for each. Two blocks of
# the network, 12 wide and 20 within, follow an embedding of 5.
BIASES = 12 + 2 * (3 * 12 + 12 + 20 + 12)
SIZES = {
    DoRA: lambda matrices: sum(m.rank * sum(m.shape) + m.shape[0] for m in matrices),
    Core: lambda matrices: sum(m.rank**2 for m in matrices),
    AdaLoRA: lambda matrices: sum(m.rank * (sum(m.shape) + 1) for m in matrices),  # as many pairs as it begins with
    LoRASB: lambda matrices: sum(m.rank**2 for m in matrices),
    HydraLoRA: lambda matrices: sum(m.rank * (m.shape[1] + 4 * m.shape[0]) + 4 * m.shape[1] for m in matrices),
    LoRAXS: lambda matrices: sum(m.rank**2 for m in matrices),
    **dict.fromkeys((Full, GaLore), lambda matrices: BIASES + 5 * 12 + 2 * (4 * 12 * 12 + 2 * 12 * 20)),
    LinearProbe: lambda matrices: 0,
    BitFit: lambda matrices: BIASES,
    Bottleneck: lambda matrices: 2 * 2 * (2 * 12 * 64 + 12 + 64),
    Bottlenecks: lambda matrices: 2 * (RANK * 12 * 2),
    VeRA: lambda matrices: sum(m.rank + m.shape[0] for m in matrices),
    TiedLoRA: lambda matrices: (
        sum(m.rank * sum(m.shape) for m in {block_and_kind(m.name)[1]: m for m in matrices}.values())
        + sum(m.rank + m.shape[0] for m in matrices)
    ),
    PeftLoRA: lambda matrices: 2 * (RANK * (24 + 32 + 32) + 12 + 20 + 12),
    IA3: lambda matrices: 2 * (12 + 20 + 20),
    OFT: lambda matrices: 2 * (12 + 12 + 20) // 4 * 6,  # the upper triangle of each rotation of 4 inputs
}
# Functions of a layer whose results a method's gradient takes for constants.
CONSTANTS = {DoRA: ("norms",)}


@pytest.fixture(params=METHODS, ids=lambda kind: kind.__name__)
def kind(request):
    return request.param


class Loop:
    """A training loop in float64, with the pretrained weights at hand, that can stop and go on."""

    def __init__(self, kind, optimizer=torch.optim.AdamW, net=toy_net, dtype=torch.float64, **settings):
        self.net = net(dtype=dtype)
        self.W0 = copy.deepcopy(self.net.state_dict())
        torch.manual_seed(3)
        method = made(kind, **{"rank": RANK, "alpha": 8.0, **settings})
        self.adaptation = Adaptation(self.net, method, ["head"], pretrained=lambda: self.W0)
        self.optimizer = trainer_of(self.adaptation, optimizer, lr=0.01)
        self.adaptation.start(sources_of(self.net, method))
        self.adaptation.plan(STEPS)
        self.events: list[int] = []

    def train(self, first: int = 1, last: int = STEPS) -> "Loop":
        dtype = next(self.net.parameters()).dtype
        for step, batch in enumerate(batches(STEPS, dtype)[first - 1 : last], start=first):
            self.optimizer.zero_grad()
            loss_of(self.net, batch).backward()
            self.adaptation.before_optimizer(step)
            self.optimizer.step()
            if self.adaptation.after_optimizer(step, self.optimizer):
                self.events.append(step)
        return self

    def file(self) -> io.BytesIO:
        left_out = {id(p) for p in self.adaptation.restorable_parameters()}
        net = {name: p.detach() for name, p in self.net.state_dict(keep_vars=True).items() if id(p) not in left_out}
        file = io.BytesIO()
        torch.save((net, self.adaptation.state_dict(compact=True), self.optimizer.state_dict()), file)
        file.seek(0)
        return file

    def load(self, file: io.BytesIO) -> "Loop":
        net, adaptation, optimizer = torch.load(file, weights_only=True)
        self.adaptation.load_state_dict(adaptation)
        assert self.net.load_state_dict(net, strict=False).unexpected_keys == []
        self.optimizer.load_state_dict(optimizer)
        return self


def same(one: nn.Module, other: nn.Module) -> None:
    for (name, value), theirs in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, theirs), name


def tensors(state) -> list[torch.Tensor]:
    return [leaf.clone() for leaf in torch.utils._pytree.tree_leaves(state) if isinstance(leaf, torch.Tensor)]


@pytest.fixture(scope="module")
def _trained():
    """A run of each method, to the end; tests leave it as it is."""
    runs: dict[type, Loop] = {}
    return lambda kind: runs.setdefault(kind, Loop(kind).train()) if kind not in runs else runs[kind]


@pytest.fixture
def run(kind, _trained):
    return _trained(kind)


def test_injection_and_start_leave_the_output(kind):
    net, x = toy_net(dtype=torch.float64), batches(1, torch.float64)[0][0]
    before = net(x)
    adaptation = Adaptation(net, made(kind, rank=RANK, alpha=8.0))
    assert torch.equal(net(x), before)
    adaptation.start(sources_of(net, adaptation.method))
    if kind.compensates:
        torch.testing.assert_close(net(x), before, rtol=0, atol=1e-13)
    else:
        assert not torch.equal(net(x), before)


def test_only_declared_tensors_move(run):
    adapters = {id(p) for layer in run.adaptation.layers.values() for p in layer.adapter_parameters()}
    weights = {id(matrix.layer.weight) for matrix in run.adaptation.matrices}
    moved = set()
    for name, parameter in run.net.named_parameters():
        declared = id(parameter) in adapters or run.adaptation.method.trains(name, parameter)
        declared |= id(parameter) in weights and run.adaptation.method.moves_weights
        if name in run.W0 and not torch.equal(parameter, run.W0[name]):
            moved.add(name)
            assert declared or name.startswith("head")
    assert {"head.weight", "head.bias"} <= moved
    still, started = run.adaptation.method.frozen_adapter(), Loop(type(run.adaptation.method)).adaptation
    for name, layer in run.adaptation.layers.items():
        values = layer.adapter_parameters(), started.layers[name].adapter_parameters()
        for adapter, value, before in zip(layer.adapter_names, *values, strict=True):
            assert torch.equal(value, before) == (adapter in still), f"{name}.{adapter}"


def test_the_weight_is_its_pretrained_self_and_the_ledger(run):
    for matrix, ledger in run.adaptation.ledgers.items():
        W0 = matrix.of_weight(run.W0[f"{matrix.layer_name}.weight"])
        if ledger.updates is not None:
            assert torch.equal(ledger.replay(W0, W0.device), matrix.weight)
            B, A = ledger.stacked()
            torch.testing.assert_close(W0 + B @ A, matrix.weight, rtol=0, atol=1e-13)
        if not run.adaptation.method.moves_weights:
            assert torch.equal(matrix.weight, W0)
    pretrained = run.adaptation.pretrained_weights()
    assert all(torch.equal(weight, run.W0[f"{name}.weight"]) for name, weight in pretrained.items())


def test_gradients_are_those_of_finite_differences(run, monkeypatch):
    """Along one random direction in each tensor that trains, with what the method takes for constant held."""
    batch, generator = batches(1, torch.float64)[0], torch.Generator().manual_seed(5)
    trained = {name: p for name, p in run.net.named_parameters() if p.requires_grad}
    for layer in run.adaptation.layers.values():
        for constant in CONSTANTS.get(type(run.adaptation.method), ()):
            value = getattr(layer, constant)()
            monkeypatch.setattr(layer, constant, lambda value=value: value)
    gradients = torch.autograd.grad(loss_of(run.net, batch), list(trained.values()))
    for (name, parameter), gradient in zip(trained.items(), gradients, strict=True):
        along = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        along *= 1e-5 / along.norm()

        def loss(sign, name=name, parameter=parameter, along=along):
            return loss_of(lambda x: functional_call(run.net, {name: parameter + sign * along}, (x,)), batch)

        with torch.no_grad():
            difference = (loss(1) - loss(-1)) / 2
        assert float(difference) == pytest.approx(float((gradient * along).sum()), rel=1e-6, abs=1e-14), name


def test_as_many_parameters_train_as_the_formula_says(kind, run):
    size = SIZES.get(kind, lambda matrices: sum(m.rank * sum(m.shape) for m in matrices))
    expected = size(run.adaptation.matrices)
    beside = sum(p.numel() for p in run.net.head.parameters())
    assert sum(p.numel() for p in run.net.parameters() if p.requires_grad) == expected + beside


def test_merging_keeps_the_output_and_is_undone_to_the_bit(run):
    x, state = batches(1, torch.float64)[0][0], copy.deepcopy(run.net.state_dict())
    if any(type(layer).merge is Adapter.merge for layer in run.adaptation.layers.values()):
        with pytest.raises(UserError, match="cannot be merged"):
            run.adaptation.merge()
        with pytest.raises(UserError, match="cannot be merged"):
            run.adaptation.merged_copy()
        return
    before = run.net.eval()(x)
    copied = run.adaptation.merged_copy()
    assert list(copied.state_dict()) == list(run.W0)
    torch.testing.assert_close(copied.double()(x), before, rtol=0, atol=1e-5)
    run.adaptation.merge()
    try:
        torch.testing.assert_close(run.net(x), before, rtol=0, atol=1e-13)
    finally:
        run.adaptation.unmerge()
        run.net.train()
    assert all(torch.equal(value, state[name]) for name, value in run.net.state_dict().items())


def test_disabled_is_the_pretrained_network(run):
    x = batches(1, torch.float64)[0][0]
    if run.adaptation.method.trains_weights:
        with pytest.raises(UserError, match=type(run.adaptation.method).__name__), run.adaptation.disabled():
            pass
        return
    pretrained = toy_net(dtype=torch.float64)
    pretrained.head.load_state_dict(run.net.head.state_dict())
    after = run.net(x)
    with run.adaptation.disabled():
        assert torch.equal(run.net(x), pretrained(x))
    assert torch.equal(run.net(x), after)


def test_the_change_is_one_lora_or_dora_for_peft(kind, tmp_path):
    peft = pytest.importorskip("peft")
    run = Loop(kind, net=SplitNet.made).train()
    if not (run.adaptation.method.additive or run.adaptation.method.rescales):
        with pytest.raises(UserError, match=kind.__name__):
            change(run.adaptation)
        return
    peft_folder.write(tmp_path, change(run.adaptation), {}, ("base", None), None)
    net = SplitNet.made(dtype=torch.float64)
    net.head.load_state_dict(run.net.head.state_dict())
    loaded = peft.PeftModel.from_pretrained(net, str(tmp_path))
    x = batches(1, torch.float64)[0][0]
    torch.testing.assert_close(loaded(x), run.net.eval()(x), rtol=0, atol=1e-5)


def test_a_run_that_stops_anywhere_goes_on_to_the_bit(kind):
    """Before the first step, at events and before them, with a state that leaves out what is pretrained."""

    def loop() -> Loop:
        return Loop(kind, net=partial(toy_net, dim=24, hidden=32))  # large enough for a ledger of several updates

    whole = loop().train()
    events = {step - before for step in (whole.events[:1] + whole.events[-1:]) for before in (0, 1)}
    for stop in sorted({0, STEPS // 2, *events}):
        resumed = loop().load(loop().train(last=stop).file()).train(first=stop + 1)
        same(resumed.net, whole.net)
        assert resumed.events == [step for step in whole.events if step > stop]
        states = (tensors(each.adaptation.state_dict()) for each in (resumed, whole))
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(*states, strict=True))


def test_a_folder_of_its_own_holds_it_all(run, tmp_path):
    run.adaptation.save(tmp_path)
    loaded = Adaptation.load(toy_net(dtype=torch.float64), tmp_path)
    same(loaded.net, run.net)
    assert loaded.method.spec() == run.adaptation.method.spec()
    assert {n for n, p in loaded.net.named_parameters() if p.requires_grad} == {
        n for n, p in run.net.named_parameters() if p.requires_grad
    }


def test_after_the_optimizer_twice_is_once(kind):
    once, twice = Loop(kind), Loop(kind)
    for step in range(1, STEPS + 1):
        once.train(step, step)
        twice.train(step, step)
        assert not twice.adaptation.after_optimizer(step, twice.optimizer)
    same(once.net, twice.net)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_an_overflow_leaves_the_state_alone(kind, poison):
    run = Loop(kind).train(last=5)
    before = tensors(run.adaptation.state_dict())
    run.optimizer.zero_grad()
    loss_of(run.net, batches(1, torch.float64)[0]).backward()
    next(p for p in run.net.parameters() if p.requires_grad).grad.view(-1)[0] = poison
    run.adaptation.before_optimizer(6)
    for ours, theirs in zip(tensors(run.adaptation.state_dict()), before, strict=True):
        assert torch.equal(ours, theirs)


def test_attached_to_an_optimizer_it_needs_no_more(kind, run):
    attached = Loop(kind)
    attached.adaptation.attach(attached.optimizer, STEPS)
    attached.adaptation.attach(attached.optimizer, STEPS)  # as once
    for batch in batches(STEPS, torch.float64):
        attached.optimizer.zero_grad()
        loss_of(attached.net, batch).backward()
        attached.optimizer.step()
    same(attached.net, run.net)


class SplitNet(ToyNet):
    """`ToyNet` with three linears in place of the fused one."""

    @classmethod
    def made(cls, dtype: torch.dtype) -> nn.Module:
        net = toy_net(dtype=dtype)
        for block in net.blocks:
            block.qkv = Three(block.qkv)
        return net


class Three(nn.Module):
    def __init__(self, fused: nn.Linear) -> None:
        super().__init__()
        parts = zip(("q_proj", "k_proj", "v_proj"), fused.weight.chunk(3), fused.bias.chunk(3), strict=True)
        for name, weight, bias in parts:
            linear = nn.Linear(weight.shape[1], len(weight)).to(weight.dtype)
            linear.load_state_dict({"weight": weight, "bias": bias})
            self.add_module(name, linear)

    def forward(self, x):
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)


def shared_of(matrix):
    """The factors that this matrix shares with others; a fused layer has one for all of its parts or one for each."""
    shared = matrix.layer.shared
    return shared[matrix.index :][:1] if len(shared) > 1 else shared


def test_a_fused_linear_equals_three(kind, run):
    three, fused, x = Loop(kind, net=SplitNet.made), Loop(kind), batches(1, torch.float64)[0][0]
    for theirs, ours in zip(fused.adaptation.matrices, three.adaptation.matrices, strict=True):
        for name in ours.layer.adapter_names:  # a random start depends on the name of the matrix
            ours.of(getattr(ours.layer, name).data).copy_(theirs.of(getattr(theirs.layer, name).data))
        for shared, their_shared in zip(shared_of(ours), shared_of(theirs), strict=True):
            shared.load_state_dict(their_shared.state_dict())
    three.train()
    torch.testing.assert_close(three.net(x), run.net(x), rtol=0, atol=1e-10)
    assert three.events == run.events


@pytest.mark.parametrize(
    "kind", [kind for kind in METHODS if kind.layer is LowRankLinear and kind.additive and not kind.own_optimizer]
)
def test_until_its_first_event_it_trains_as_peft_does(kind):
    peft = pytest.importorskip("peft")
    ours = Loop(kind, torch.optim.SGD, net=SplitNet.made)
    net = SplitNet.made(torch.float64)
    targets = [matrix.layer_name for matrix in ours.adaptation.matrices]
    config = peft.LoraConfig(r=RANK, lora_alpha=8, target_modules=targets, modules_to_save=["head"])
    theirs = peft.get_peft_model(net, config).double()
    for matrix in ours.adaptation.matrices:
        layer = theirs.base_model.model.get_submodule(matrix.layer_name)
        layer.base_layer.weight.data.copy_(matrix.weight)
        layer.lora_A["default"].weight.data.copy_(matrix.A)
        layer.lora_B["default"].weight.data.copy_(matrix.B)
    steps = (ours.adaptation.controller.progress().next_step or STEPS) - 1
    assert steps > 0
    optimizer = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=0.01)
    for batch in batches(STEPS, torch.float64)[:steps]:
        optimizer.zero_grad()
        loss_of(theirs, batch).backward()
        optimizer.step()
    ours.train(last=steps)
    x = batches(1, torch.float64)[0][0]
    torch.testing.assert_close(theirs(x), ours.net(x), rtol=0, atol=1e-12)


@pytest.fixture(scope="module")
def in_two(tmp_path_factory):
    """What two processes, each with half of every batch, make of each method."""
    folder: Path = tmp_path_factory.mktemp("parallel")
    context = torch.multiprocessing.spawn(parallel, (METHODS, STEPS, RANK, str(folder)), nprocs=2, join=False)
    deadline = time.monotonic() + 120
    while not context.join(timeout=5):
        assert time.monotonic() < deadline, "two processes did not end within two minutes"
    return lambda kind, rank: torch.load(folder / f"{kind.__name__}-{rank}.pt", weights_only=True)


def test_two_processes_equal_one(kind, in_two):
    one = trained_in_one_process(kind, STEPS, RANK)
    for name, value in one.items():
        assert torch.equal(in_two(kind, 0)[name], in_two(kind, 1)[name]), name
        torch.testing.assert_close(in_two(kind, 0)[name], value, rtol=0, atol=1e-9, msg=name)
