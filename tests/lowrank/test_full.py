"""Full fine-tuning beyond the contract."""

import pytest
import torch
from torch import nn

from srlora_pl import UserError
from srlora_pl.lowrank import Adaptation, BitFit, Full, LoRA
from tests.helpers.errors import mentions
from tests.helpers.toys import assert_same_state, optimizer_of, toy_batches, toy_net, train


def trained(method=None, steps: int = 6) -> tuple[nn.Module, Adaptation]:
    net = toy_net()
    adaptation = Adaptation(net, method or Full(), ["head"])
    adaptation.start()
    train(net, adaptation, optimizer_of(net), toy_batches(steps))
    return net, adaptation


def test_it_trains_as_a_plain_loop_does_to_the_bit() -> None:
    net, _ = trained()
    plain = toy_net()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.01)
    for x, y in toy_batches(6):
        optimizer.zero_grad()
        nn.functional.cross_entropy(plain(x), y).backward()
        optimizer.step()
    assert_same_state(net, plain)


def test_every_parameter_moves() -> None:
    before = toy_net().state_dict()
    assert not [name for name, value in trained()[0].state_dict().items() if torch.equal(value, before[name])]


@pytest.mark.parametrize("other", [LoRA(), BitFit()])
def test_no_other_method_goes_on_from_its_state(other) -> None:
    _, adaptation = trained()
    with pytest.raises(UserError, match=mentions("srlora_pl.Full", f"srlora_pl.{type(other).__name__}")):
        Adaptation(toy_net(), other).load_state_dict(adaptation.state_dict())


def test_what_has_no_gradient_stays() -> None:
    net = toy_net()
    net.count = nn.Parameter(torch.tensor(3), requires_grad=False)
    Adaptation(net, Full())
    assert not net.count.requires_grad
    assert all(p.requires_grad for name, p in net.named_parameters() if name != "count")
