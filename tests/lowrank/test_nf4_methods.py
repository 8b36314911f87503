"""Every method on a network whose frozen linears are in four bits, beside the same values in float32."""

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from srlora_pl import UserError
from srlora_pl.lowrank import Adaptation, Adapter, BitFit, LoRA
from srlora_pl.lowrank.delta import change
from srlora_pl.lowrank.nf4 import NF4, plain, quantize
from srlora_pl.lowrank.targets import linears_in_blocks
from tests.helpers.contract_program import batches
from tests.helpers.errors import mentions
from tests.helpers.methods import METHODS, made
from tests.helpers.short_runs import ShortRun
from tests.helpers.toys import ToyNet, toy_net

pytest.importorskip("bitsandbytes")
CHANGE_WEIGHTS = [kind for kind in METHODS if kind.moves_weights or (kind.trains_weights and kind is not BitFit)]
LEAVE_WEIGHTS = [kind for kind in METHODS if kind not in CHANGE_WEIGHTS]
pytestmark = pytest.mark.filterwarnings("ignore:target_rank 128 is above", "ignore:.*no whole number of switches")


def four_bits() -> ToyNet:
    net = toy_net()
    quantize(linears_in_blocks(net, ["head"]).values())
    return net


def values() -> ToyNet:
    """The same values in float32."""
    net = four_bits()
    for linear in linears_in_blocks(net, []).values():
        linear.weight = nn.Parameter(plain(linear.weight))
    return net


class Run(ShortRun):
    """Can go on from a file's content."""

    def __init__(self, kind: type, net: ToyNet, autocast: bool = False) -> None:
        super().__init__(kind, net, autocast)

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.net.named_parameters() if p.requires_grad}

    def file(self) -> io.BytesIO:
        left_out = {id(p) for p in self.adaptation.restorable_parameters()}
        net = {name: p.detach() for name, p in self.net.state_dict(keep_vars=True).items() if id(p) not in left_out}
        assert not any(isinstance(value, NF4) for value in net.values())
        file = io.BytesIO()
        torch.save((net, self.adaptation.state_dict(compact=True), self.optimizer.state_dict()), file)
        file.seek(0)
        return file

    def load(self, file: io.BytesIO) -> "Run":
        net, adaptation, optimizer = torch.load(file, weights_only=True)
        self.adaptation.load_state_dict(adaptation)
        assert self.net.load_state_dict(net, strict=False).unexpected_keys == []
        self.optimizer.load_state_dict(optimizer)
        return self


def assert_equal(run: Run, other: Run) -> None:
    for (name, ours), theirs in zip(run.trained().items(), other.trained().values(), strict=True):
        assert torch.equal(ours, theirs), name
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad), name


def assert_same_weights(net: nn.Module, other: nn.Module) -> None:
    """To the bit, and those in four bits still in four bits."""
    count = 0
    for (name, ours), theirs in zip(net.state_dict().items(), other.state_dict().values(), strict=True):
        assert type(ours) is type(theirs), name
        pairs = ((ours.packed, theirs.packed), (ours.scales, theirs.scales)) if type(ours) is NF4 else ((ours, theirs),)
        assert all(torch.equal(*pair) for pair in pairs), name
        count += type(ours) is NF4
    assert count == 8


@pytest.fixture(params=LEAVE_WEIGHTS, ids=lambda kind: kind.__name__)
def kind(request):
    return request.param


@pytest.mark.parametrize("autocast", [False, True])
def test_it_trains_to_the_bit_as_beside_the_values(kind, autocast):
    run, other = Run(kind, four_bits(), autocast), Run(kind, values(), autocast)
    assert_equal(run, other)
    assert_equal(run.train(), other.train())
    for name, value in run.W0.items():
        if isinstance(value, NF4):
            module, _, leaf = name.rpartition(".")
            now = getattr(getattr(run.net.get_submodule(module), "base_layer", run.net.get_submodule(module)), leaf)
            assert torch.equal(now.packed, value.packed), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", CHANGE_WEIGHTS, ids=lambda kind: kind.__name__)
def test_a_method_that_changes_weights_is_refused_by_name(kind, dtype):
    with pytest.raises(UserError, match=mentions(kind.__name__, "four bits", "model.weights nf4", "LoRA")):
        Adaptation(four_bits().to(dtype), made(kind), ["head"])


def test_it_stops_and_goes_on_to_the_bit(kind):
    whole, stopped = Run(kind, four_bits()).train(), Run(kind, four_bits()).train(last=3)
    resumed = Run(kind, four_bits()).load(stopped.file()).train(first=4)
    assert_equal(resumed, whole)
    assert_same_weights(resumed.net, whole.net)


def test_merged_weights_are_plain_and_come_back_to_the_bit(kind):
    run, x = Run(kind, four_bits()).train(), batches(1, torch.float32)[0][0]
    before, parameters = copy.deepcopy(run.net), dict(run.net.named_parameters())
    y = run.net.eval()(x)
    if any(type(layer).merge is Adapter.merge for layer in run.adaptation.layers.values()):
        with pytest.raises(UserError, match="cannot be merged"):
            run.adaptation.merged_copy()
        return
    copied = run.adaptation.merged_copy()
    assert {type(p) for p in copied.parameters()} == {nn.Parameter}
    assert list(copied.state_dict()) == list(run.W0)
    torch.testing.assert_close(copied(x), y, rtol=0, atol=2e-6)
    run.adaptation.merge()
    for layer in run.adaptation.layers.values():
        weights = [p for p in layer.module.parameters() if isinstance(p, NF4)]
        assert not weights
    torch.testing.assert_close(run.net(x), y, rtol=0, atol=2e-6)
    run.adaptation.unmerge()
    assert_same_weights(run.net, before)
    assert all(parameter is parameters[name] for name, parameter in run.net.named_parameters())


def test_disabled_is_the_network_in_four_bits(kind):
    run, x = Run(kind, four_bits()).train(), batches(1, torch.float32)[0][0]
    if run.adaptation.method.trains_weights:
        return
    pretrained, after = four_bits(), run.net(x)
    pretrained.head.load_state_dict(run.net.head.state_dict())
    with run.adaptation.disabled():
        assert torch.equal(run.net(x), pretrained(x))
    assert torch.equal(run.net(x), after)


def test_a_folder_of_its_own_holds_it_all(kind, tmp_path):
    run = Run(kind, four_bits()).train()
    run.adaptation.save(tmp_path)
    loaded = Adaptation.load(four_bits(), tmp_path)
    assert_same_weights(loaded.net, run.net)
    other = four_bits()
    other.blocks[1].fc2.weight.packed[-1] ^= 1
    for net in (values(), other):
        with pytest.raises(UserError, match="other pretrained weights"):
            Adaptation.load(net, tmp_path)


def test_copies_and_doubles_compute_the_same(kind):
    run, x = Run(kind, four_bits()).train(), batches(1, torch.float32)[0][0]
    y = run.net.eval()(x)
    assert torch.equal(copy.deepcopy(run.net)(x), y)
    doubled = copy.deepcopy(run.net).double()
    torch.testing.assert_close(doubled(x.double()).float(), y, rtol=0, atol=2e-6)
    assert any(isinstance(p, NF4) for p in doubled.parameters())


def test_what_is_exported_is_a_change_of_the_values():
    run = Run(LoRA, four_bits()).train()
    factors, W0 = change(run.adaptation), run.adaptation.pretrained_weights()
    plain_copy = run.adaptation.merged_copy()
    for name, each in factors.items():
        assert type(W0[name]) is Tensor
        W = plain_copy.get_parameter(f"{name}.weight").double()
        torch.testing.assert_close(each.applied_to(W0[name]), W, rtol=0, atol=1e-7)


def test_an_adapted_weight_is_read_part_by_part_and_never_changes():
    run = Run(LoRA, four_bits())
    for matrix in run.adaptation.matrices:
        weight = plain(matrix.layer.weight)
        assert torch.equal(matrix.weight, matrix.of_weight(weight))
        with pytest.raises(UserError, match=mentions("four bits", "bfloat16")):
            run.adaptation.add(matrix, matrix.B, matrix.A, 1.0)
        assert torch.equal(plain(matrix.layer.weight), weight)


def test_a_head_in_the_blocks_stays_whole():
    net = toy_net()
    assert set(linears_in_blocks(net, ["head", "blocks.1"])) == {f"blocks.0.{n}" for n in ("qkv", "proj", "fc1", "fc2")}
