"""DoRA beyond the contract: it is PEFT's DoRA, with and without dropout, and is exported as one."""

import pytest
import torch
from torch import nn

from srlora_pl.lowrank import Adaptation, DoRA
from srlora_pl.lowrank.delta import change
from srlora_pl.models import peft_folder
from tests.helpers.toys import toy_batches, toy_net, trained


class One(nn.Module):
    """A single linear, under a name that both libraries adapt."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.proj = nn.Linear(20, 12, bias).double()

    def forward(self, x):
        return self.proj(x)


def random_dora(**settings) -> nn.Module:
    """`One` with random values in all adapter parameters."""
    net = One(settings.pop("bias", True))
    Adaptation(net, DoRA(rank=3, alpha=6.0, target_modules=["proj"], **settings))
    for parameter in (net.proj.lora_A, net.proj.lora_B, net.proj.lora_magnitude):
        parameter.data.copy_(torch.randn_like(parameter))
    return net


def in_peft(net: nn.Module, dropout: float = 0.0) -> nn.Module:
    peft = pytest.importorskip("peft")
    ours = net.proj
    config = peft.LoraConfig(r=3, lora_alpha=6, use_dora=True, target_modules=["proj"], lora_dropout=dropout)
    theirs = peft.get_peft_model(One(ours.bias is not None), config).double()
    layer = theirs.base_model.model.proj
    layer.lora_A["default"].weight.data.copy_(ours.lora_A)
    layer.lora_B["default"].weight.data.copy_(ours.lora_B)
    layer.lora_magnitude_vector["default"].weight.data.copy_(ours.lora_magnitude)
    return theirs


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients_are_those_of_peft(bias: bool, dropout: float) -> None:
    net = random_dora(bias=bias, dropout=dropout)
    theirs = in_peft(net, dropout)
    x, dy = torch.randn(5, 7, 20).double().requires_grad_(), torch.randn(5, 7, 12).double()
    torch.manual_seed(1)
    found = net(x)
    torch.manual_seed(1)
    expected = theirs(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    layer = theirs.base_model.model.proj
    ours = (x, net.proj.lora_A, net.proj.lora_B, net.proj.lora_magnitude)
    modules = (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector)
    gradients = torch.autograd.grad(expected, (x, *(each["default"].weight for each in modules)), dy)
    for gradient, theirs_ in zip(torch.autograd.grad(found, ours, dy), gradients, strict=True):
        torch.testing.assert_close(gradient, theirs_, rtol=0, atol=1e-12)


@pytest.mark.parametrize("targets", [["qkv"], ["query", "value"], ["fc1"]])
def test_the_norms_are_those_of_the_whole_rows(targets: list[str]) -> None:
    """Of the adapted parts of a fused linear; no (out, in) temporary is made."""
    adaptation = Adaptation(toy_net(dtype=torch.float64), DoRA(rank=3, target_modules=targets))
    for matrix in adaptation.matrices:
        matrix.B.copy_(torch.randn_like(matrix.B))
        rows = matrix.weight + matrix.scaling * matrix.B @ matrix.A
        torch.testing.assert_close(matrix.of(matrix.layer.norms()), rows.norm(dim=1), rtol=1e-13, atol=0)


def test_rows_have_the_length_of_their_magnitude_and_the_direction_of_lora() -> None:
    adaptation, before = trained(DoRA(rank=4, alpha=8.0), dtype=torch.float64)
    for matrix in adaptation.matrices:
        magnitude = matrix.of(matrix.layer.lora_magnitude.detach())
        effective = matrix.of_weight(matrix.layer.merged_weight())
        rows = matrix.weight + matrix.scaling * matrix.B @ matrix.A
        torch.testing.assert_close(effective.norm(dim=1), magnitude, rtol=1e-13, atol=0)
        torch.testing.assert_close(
            nn.functional.normalize(effective), nn.functional.normalize(rows), rtol=0, atol=1e-13
        )
        W0 = matrix.of_weight(before.get_parameter(f"{matrix.layer_name}.weight").detach())
        assert float((magnitude - W0.norm(dim=1)).abs().min()) > 1e-4, "each magnitude trains"
        assert torch.linalg.matrix_rank(effective - W0) == min(matrix.shape)


def test_a_row_of_zeros_stays_one() -> None:
    """And is no NaN for the whole network."""
    net = toy_net()
    net.blocks[0].fc1.weight.data[3] = 0
    adaptation = Adaptation(net, DoRA(rank=2))
    loss = net(toy_batches(1)[0][0]).square().sum()
    loss.backward()
    assert all(
        p.grad.isfinite().all()
        for layer in adaptation.layers.values()
        for p in layer.parameters()
        if p.grad is not None
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_under_autocast_norms_and_gain_stay_in_float32(dtype: torch.dtype) -> None:
    net = toy_net()
    Adaptation(net, DoRA(rank=2, target_modules=["fc1"]))
    layer = net.blocks[0].fc1
    layer.lora_magnitude.data *= 1.001  # half precision keeps steps of 0.8 % or 0.1 %
    layer.lora_B.data.normal_()
    rows = layer.weight + layer.scaling * layer.lora_B @ layer.lora_A
    expected = layer.lora_magnitude / rows.norm(dim=1)
    with torch.autocast("cpu", dtype):
        gain = layer.gain()
        y = layer(torch.randn(4, 12))
    assert y.dtype == dtype
    torch.testing.assert_close(gain, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("targets", [["qkv"], ["query", "value"]])
def test_a_fused_linear_is_one_dora_for_peft(targets: list[str], tmp_path) -> None:
    peft = pytest.importorskip("peft")
    adaptation, before = trained(DoRA(rank=2, alpha=8.0, target_modules=targets), dtype=torch.float64)
    before.head.load_state_dict(adaptation.net.head.state_dict())
    factors = change(adaptation)
    assert {each.rank for each in factors.values()} == {2 * len(targets) if len(targets) > 1 else 6}
    peft_folder.write(tmp_path, factors, {}, "base", None)
    x = toy_batches(1, dtype=torch.float64)[0][0]
    expected = adaptation.net(x)
    for name, each in factors.items():
        W0 = before.get_parameter(f"{name}.weight").detach()
        torch.testing.assert_close(each.applied_to(W0), adaptation.layers[name].merged_weight(), rtol=0, atol=1e-6)
    theirs = peft.PeftModel.from_pretrained(before, str(tmp_path))
    torch.testing.assert_close(theirs(x), expected, rtol=0, atol=1e-5)
