"""Frozen weights in bfloat16: what trains beside them is, and computes, as beside the same values in float32."""

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from srlora_pl import UserError
from srlora_pl.lowrank import Adaptation, Adapter, Bottleneck, LinearProbe, kernels
from srlora_pl.lowrank.linear import SharedFactors
from tests.helpers.errors import mentions
from tests.helpers.methods import IA3, METHODS, OFT, Bottlenecks, PeftLoRA, made
from tests.helpers.short_runs import ShortRun
from tests.helpers.toys import ToyNet, assert_same_state

TUNERS = (IA3, OFT, PeftLoRA)
TRAIN_WEIGHTS = [kind for kind in METHODS if kind.trains_weights]
OTHERS = [kind for kind in METHODS if not kind.trains_weights]
LEAVE_WEIGHTS = [kind for kind in OTHERS if not kind.moves_weights]
WHOLE = (*TUNERS, Bottleneck, Bottlenecks, LinearProbe)  # which leave some linears as they were
pytestmark = pytest.mark.filterwarnings("ignore:target_rank 128 is above", "ignore:.*no whole number of switches")


class Coarse(ToyNet):
    """Frozen weights in bfloat16, a head that trains in float32; takes float32."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.to(self.embed.weight.dtype))
        for block in self.blocks:
            x = block(x)
        return self.head(x.to(self.head.weight.dtype))


def coarse() -> ToyNet:
    torch.manual_seed(0)
    net = Coarse().bfloat16()
    net.head.float()
    return net


def fine() -> ToyNet:
    """The same values in float32."""
    return coarse().float()


class Run(ShortRun):
    def trained(self) -> dict[str, nn.Parameter]:
        adapters = {
            f"{name}.{own}": parameter
            for name, layer in self.adaptation.layers.items()
            for own, parameter in zip(layer.adapter_names, layer.adapter_parameters(), strict=True)
        }
        return adapters | {name: p for name, p in self.net.named_parameters() if p.requires_grad}


@pytest.fixture(params=OTHERS, ids=lambda kind: kind.__name__)
def kind(request):
    return request.param


@pytest.fixture
def one_kernel(monkeypatch):
    """The choice between two equal sums depends on the weight's type."""
    monkeypatch.setattr(kernels, "merging_pays", lambda *_: False)


def assert_equal(run: Run, other: Run) -> None:
    for (name, ours), theirs in zip(run.trained().items(), other.trained().values(), strict=True):
        assert ours.dtype == torch.float32, name
        assert torch.equal(ours, theirs), name


def test_it_trains_under_autocast_as_beside_the_same_values_in_float32(kind, one_kernel):
    run, other = (Run(kind, net) for net in (coarse(), fine()))
    if kind in (*TUNERS, Bottlenecks):  # whose random start was rounded before it was ours
        for ours, theirs in zip(run.trained().values(), other.trained().values(), strict=True):
            theirs.data.copy_(ours.data)
    assert_equal(run, other)
    assert run.train().losses == other.train().losses
    assert_equal(run, other)
    for ours, theirs in zip(run.adaptation.matrices, other.adaptation.matrices, strict=True):
        assert torch.equal(ours.weight, theirs.weight), ours.name
    moved = {f"{matrix.layer_name}.weight" for matrix in run.adaptation.matrices if kind.moves_weights}
    for name, value in run.W0.items():
        module, _, leaf = name.rpartition(".")
        now = getattr(getattr(run.net.get_submodule(module), "base_layer", run.net.get_submodule(module)), leaf)
        assert now.dtype == value.dtype
        assert torch.equal(now, value) != (name.startswith("head") or name in moved), name


def test_without_autocast_it_trains_in_the_type_of_what_passes(kind):
    run, other = Run(kind, coarse(), autocast=False).train(), Run(kind, coarse()).train()
    assert {p.dtype for p in run.trained().values()} == {torch.float32}
    torch.testing.assert_close(run.losses, other.losses, rtol=0.05, atol=0)


@pytest.mark.parametrize("kind", [kind for kind in LEAVE_WEIGHTS if kind not in WHOLE], ids=lambda kind: kind.__name__)
def test_layers_that_are_given_float32_compute_in_float32(kind, one_kernel):
    net = fine()
    net.blocks.bfloat16()
    assert_equal(*(Run(kind, each, autocast=False).train() for each in (net, fine())))


@pytest.mark.parametrize("kind", TRAIN_WEIGHTS, ids=lambda kind: kind.__name__)
def test_a_method_that_trains_weights_is_refused_by_name(kind):
    with pytest.raises(UserError, match=mentions(kind.__name__, "torch.bfloat16", "float32", "LoRA")):
        Adaptation(coarse(), made(kind), ["head"])


def test_a_head_in_half_precision_is_refused():
    with pytest.raises(UserError, match=mentions("LinearProbe", "torch.bfloat16", "what trains")):
        Adaptation(coarse().bfloat16(), LinearProbe(), ["head"])


def test_a_merged_weight_is_rounded_once_and_comes_back_to_the_bit(kind):
    run = Run(kind, coarse()).train()
    layers = {n: layer for n, layer in run.adaptation.layers.items() if not isinstance(layer, SharedFactors)}
    if any(type(layer).merge is Adapter.merge for layer in layers.values()):
        return
    before, exact = copy.deepcopy(run.net.state_dict()), run.adaptation.merged_copy()
    twin = Run(kind, fine())
    twin.net.load_state_dict(before)
    assert_same_state(exact, twin.adaptation.merged_copy())
    run.adaptation.merge()
    for name, layer in layers.items():
        merged = layer.module.get_base_layer().weight if kind in TUNERS else layer.weight
        assert merged.dtype == torch.bfloat16
        assert torch.equal(merged, exact.get_submodule(name).weight.bfloat16()), name
    run.adaptation.unmerge()
    for name, value in run.net.state_dict().items():
        assert value.dtype == before[name].dtype, name
        assert torch.equal(value, before[name]), name


def test_a_compact_file_holds_what_trains_and_a_run_goes_on_to_the_bit(kind):
    whole, first = Run(kind, coarse()).train(), Run(kind, coarse()).train(last=3)
    left_out = {id(p) for p in first.adaptation.restorable_parameters()}
    kept = {name: p for name, p in first.net.state_dict(keep_vars=True).items() if id(p) not in left_out}
    assert {p.dtype for p in kept.values()} == {torch.float32}
    file = io.BytesIO()
    torch.save((kept, first.adaptation.state_dict(compact=True), first.optimizer.state_dict()), file)
    file.seek(0)
    net, adaptation, optimizer = torch.load(file, weights_only=True)
    resumed = Run(kind, coarse())
    resumed.adaptation.load_state_dict(adaptation)
    resumed.net.load_state_dict(net, strict=False)
    resumed.optimizer.load_state_dict(optimizer)
    resumed.train(first=4)
    assert_same_state(resumed.net, whole.net)


def test_a_folder_of_its_own_holds_it_all(kind, tmp_path):
    run = Run(kind, coarse()).train()
    run.adaptation.save(tmp_path)
    assert_same_state(Adaptation.load(coarse(), tmp_path).net, run.net)
