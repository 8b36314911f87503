"""States of other versions."""

from dataclasses import asdict

import pytest
import torch
from torch.utils._pytree import tree_flatten

from srlora_pl import UserError
from srlora_pl.lowrank import Adaptation, Spectrum
from srlora_pl.lowrank.formats import FORMAT, histories
from tests.helpers.paths import ROOT
from tests.helpers.toys import METHODS, begun, finished, srlora, toy_batches, toy_net, train


def of_version_0_1(name):
    """The adaptation's state in a checkpoint that version 0.1 wrote."""
    return torch.load(ROOT / "tests" / "nets" / "checkpoints" / f"{name}.ckpt", weights_only=True)["srlora"]


def test_a_state_of_a_later_version_is_refused_before_anything_changes():
    _, adaptation, _ = finished(srlora(), steps=5)
    state = adaptation.state_dict() | {"format": FORMAT + 1}
    other = Adaptation(toy_net(), srlora())
    with pytest.raises(UserError, match=rf"format {FORMAT + 1} .* reads up to {FORMAT}: update srlora_pl"):
        other.load_state_dict(state)
    assert not other.started
    assert other.step == 0


@pytest.mark.parametrize("method", METHODS)
def test_the_histories_of_a_state_are_those_of_the_network(method):
    _, adaptation, _ = finished(METHODS[method])
    found, expected = histories(adaptation.state_dict()), adaptation.controller.histories()
    assert list(found) == list(expected) == ([m.name for m in adaptation.matrices] if method == "srlora" else [])
    assert all(torch.equal(found[name], intervals) for name, intervals in expected.items())


@pytest.mark.parametrize("checkpoints", ["compact", "full"])
def test_the_histories_of_a_state_of_version_0_1(checkpoints):
    """Seven steps, with switches of one pair of two after the third and the sixth."""
    state = of_version_0_1(f"image-srlora-{checkpoints}-mid")
    assert "format" not in state
    found = histories(state)
    assert list(found) == list(state["matrices"])
    for intervals in found.values():
        assert intervals[:, 0].tolist() == [0, 0, 3, 6]
        assert sorted(intervals[:, 1].tolist()) == [-1, -1, 3, 6]


@pytest.mark.parametrize("name", ["image-lora-compact-mid", "text-pissa-compact-mid"])
def test_methods_without_switches_have_no_histories(name):
    state = of_version_0_1(name)
    assert state["matrices"]
    assert histories(state) == {}


def as_version_0_1(adaptation):
    """Its compact state as version 0.1 wrote it: directions and fused pairs instead of updates."""
    state, controller = adaptation.state_dict(compact=True), adaptation.controller
    switches = "intervals" in state["controller"]
    matrices = {}
    for matrix in adaptation.matrices:
        updates = state["matrices"][matrix.name]["updates"]
        intervals = controller.histories().get(matrix.name, torch.tensor([[0, -1]]).repeat(matrix.rank, 1))
        W0 = matrix.of_weight(toy_net().get_parameter(f"{matrix.layer_name}.weight").detach())
        drawn = Spectrum.of(W0, len(intervals)) if updates else None
        matrices[matrix.name] = {
            "directions": controller.active[matrix.name] if switches else torch.arange(matrix.rank),
            "intervals": intervals,
            "fused": None if updates is None else [(B, A) for B, A, _ in updates[1::2]],
            "drawn": drawn and (drawn.U, drawn.sigma, drawn.Vh),
            "weight": state["matrices"][matrix.name]["weight"],
        }
    paces = controller.paces.items() if switches else ()
    shared = ("method", "base_fingerprint", "compact", "changed", "started", "steps_before", "last_step")
    return {
        **{key: state[key] for key in shared},
        **{key: state["controller"].get(key) for key in ("smoothed", "uncertainty")},
        "switches_done": controller.progress().done,
        "done": {rank: pace.done for rank, pace in paces},
        "schedules": {rank: asdict(pace.schedule) for rank, pace in paces},
        "matrices": matrices,
    }


UPGRADED = METHODS | {
    "ledger": srlora(rank=2, target_rank=6),
    "ranks": srlora(target_rank=10, rank_pattern={"fc1": 2}),
}


@pytest.mark.parametrize("method", UPGRADED)
def test_a_state_of_version_0_1_comes_back_as_one_of_the_present_format(method):
    net, adaptation, optimizer = begun(UPGRADED[method])
    train(net, adaptation, optimizer, toy_batches(13))
    state = adaptation.state_dict(compact=True)
    if "recording" in state["controller"]:
        state["controller"]["recording"] = {"sizes": {}, "records": []}  # which it did not keep
    forgotten = {each["updates"] is None for each in state["matrices"].values()}
    assert forgotten == {"srlora": {True}, "ranks": {True, False}}.get(method, {False})
    other = Adaptation(toy_net(), UPGRADED[method])
    other.load_state_dict(as_version_0_1(adaptation))
    assert other.step == 13
    for name, layer in other.layers.items():
        assert torch.equal(layer.weight, adaptation.layers[name].weight), name
    ours, expected = (tree_flatten(each) for each in (other.state_dict(compact=True), state))
    assert ours[1] == expected[1]
    for value, theirs in zip(ours[0], expected[0], strict=True):
        assert torch.equal(value, theirs) if isinstance(value, torch.Tensor) else value == theirs


def test_the_first_states_of_version_0_1_did_not_count_steps():
    _, adaptation, _ = finished(srlora(), steps=5)
    state = as_version_0_1(adaptation)
    del state["steps_before"], state["last_step"]
    other = Adaptation(toy_net(), srlora())
    other.load_state_dict(state)
    assert (other.step, other.steps_before) == (0, 0)
