"""VeRA beyond the contract: it is PEFT's VeRA on the same random factors."""

import copy
import pickle

import pytest
import torch
from torch import nn

from srlora_pl import UserError
from srlora_pl.lowrank import Adaptation, VeRA
from srlora_pl.lowrank.delta import change
from tests.helpers.toys import changes, toy_batches, toy_net, trained

TARGETS = ["proj", "fc1", "fc2"]


def adapted(**settings) -> Adaptation:
    return Adaptation(
        toy_net(dtype=torch.float64), VeRA(**{"rank": 16, "target_modules": TARGETS, **settings}), ["head"]
    )


def randomized(adaptation: Adaptation) -> Adaptation:
    for matrix in adaptation.matrices:
        matrix.layer.lora_d.data.normal_()
        matrix.layer.lora_b.data.normal_()
    return adaptation


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_outputs_and_gradients_are_those_of_peft(dropout: float) -> None:
    """Of layers of unlike shapes, which take the leading slices of A and B."""
    peft = pytest.importorskip("peft")
    ours = randomized(adapted(dropout=dropout))
    config = peft.VeraConfig(r=16, target_modules=TARGETS, vera_dropout=dropout, modules_to_save=["head"])
    theirs = peft.get_peft_model(toy_net(dtype=torch.float64), config).double()
    shared = ours.matrices[0].layer.shared[0]
    theirs.base_model.vera_A["default"].copy_(shared.shared_A)
    theirs.base_model.vera_B["default"].copy_(shared.shared_B)
    pairs = []
    for matrix in ours.matrices:
        layer = theirs.base_model.model.get_submodule(matrix.layer_name)
        for our, their in [
            (matrix.layer.lora_d, layer.vera_lambda_d["default"]),
            (matrix.layer.lora_b, layer.vera_lambda_b["default"]),
        ]:
            their.data.copy_(our)
            pairs.append((our, their))
    x = toy_batches(1, dtype=torch.float64)[0][0]
    outputs = []
    for net in (ours.net, theirs):
        torch.manual_seed(1)
        outputs.append(net.train()(x))
        outputs[-1].square().sum().backward()
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
    for our, their in pairs:
        torch.testing.assert_close(our.grad, their.grad, rtol=1e-11, atol=1e-11)


def test_the_random_factors_start_as_in_peft() -> None:
    """Kaiming-uniform with gain sqrt 2: A of the largest input, B of the largest output."""
    shared = adapted(rank=20).matrices[0].layer.shared[0]
    assert shared.shared_A.shape == (20, 20)
    assert shared.shared_B.shape == (20, 20)
    for factor in (shared.shared_A, shared.shared_B):
        bound = (6 / factor.shape[1]) ** 0.5
        assert 0.95 * bound < float(factor.abs().max()) <= bound


def test_the_random_factors_depend_on_the_seed_alone() -> None:
    def factors(seed: int, drawn: int = 0) -> torch.Tensor:
        net = toy_net()
        torch.manual_seed(seed)
        torch.randn(drawn)
        return Adaptation(net, VeRA(rank=4)).matrices[0].layer.shared[0].shared_A

    assert torch.equal(factors(1), factors(1, drawn=5))
    assert not torch.equal(factors(1), factors(2))


def test_all_layers_share_one_pair_of_factors() -> None:
    """Which copies and pickles keep, and which stands in the state once."""
    adaptation = randomized(adapted())
    for net in (adaptation.net, copy.deepcopy(adaptation.net), pickle.loads(pickle.dumps(adaptation.net))):
        holders = {id(each) for module in net.modules() for each in getattr(module, "shared", ())}
        assert holders == {id(net.vera)}
        assert [name for name in net.state_dict() if "shared" in name] == ["vera.shared_A", "vera.shared_B"]
        assert sum(p.requires_grad for p in net.vera.parameters()) == 0


def test_the_rank_may_be_above_that_of_the_weight() -> None:
    adaptation, before = trained(VeRA(rank=40, target_modules=["proj"]), dtype=torch.float64)
    for name, wanted in changes(adaptation, before).items():
        assert 0 < torch.linalg.matrix_rank(wanted) <= 12
        found = change(adaptation)[name]
        assert found.rank == 12
        torch.testing.assert_close(found.B.double() @ found.A.double(), wanted, rtol=0, atol=1e-7)


def test_the_change_has_the_rank_of_the_factors() -> None:
    adaptation = randomized(adapted(rank=3))
    for matrix in adaptation.matrices:
        assert torch.linalg.matrix_rank(matrix.layer.merged_weight() - matrix.weight, atol=1e-10) == 3


def test_a_rank_of_its_own_takes_leading_slices() -> None:
    adaptation = adapted(rank=6, rank_pattern={"fc1": 2})
    shared = adaptation.matrices[0].layer.shared[0]
    ranks = {matrix.layer_name.rpartition(".")[2]: matrix.layer.factors()[1] for matrix in adaptation.matrices}
    assert {name: len(A) for name, A in ranks.items()} == {"proj": 6, "fc1": 2, "fc2": 6}
    torch.testing.assert_close(ranks["fc1"], 0.1 * shared.shared_A[:2, :12])


@pytest.mark.parametrize("alpha", [1.0, 32.0])
def test_alpha_has_no_meaning(alpha: float) -> None:
    assert {matrix.scaling for matrix in adapted(alpha=alpha).matrices} == {1.0}


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"alpha_pattern": {"fc1": 4.0}}, "alpha_pattern"),
        ({"use_rslora": True}, "use_rslora"),
        ({"d_initial": 0.0}, "d_initial is 0.0"),
        ({"d_initial": float("nan")}, "d_initial is nan"),
    ],
)
def test_what_has_no_meaning_is_refused(settings: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        VeRA(**settings)


def test_the_defaults_are_the_papers() -> None:
    assert (VeRA().rank, VeRA().d_initial) == (256, 0.1)


def test_d_and_b_are_vectors() -> None:
    """So that they are not decayed; of a fused linear too."""
    adaptation = Adaptation(toy_net(), VeRA(rank=5, target_modules=["qkv"]))
    layer: nn.Module = adaptation.matrices[0].layer
    assert layer.lora_d.shape == (15,)
    assert layer.lora_b.shape == (36,)
