"""The linear probe beyond the contract: its features are fixed."""

import copy
import pickle

import pytest
import torch
from torch import nn

from srlora_pl import UserError
from srlora_pl.lowrank import Adaptation, LinearProbe
from tests.helpers.errors import mentions
from tests.helpers.toys import optimizer_of, train


class Net(nn.Module):
    """With dropout as a module and as a function, statistics of batches, and dropout inside its head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 3))
        self.features = torch.empty(0)

    def forward(self, x):
        self.features = nn.functional.dropout(self.body(x), 0.5, self.training)
        return self.head(self.features)


def probed() -> tuple[Net, Adaptation]:
    torch.manual_seed(0)
    net = Net()
    return net, Adaptation(net, LinearProbe(), ["head"])


def through_pickle(net: Net) -> Net:
    return pickle.loads(pickle.dumps(net))


@pytest.mark.parametrize("copied", [lambda net: net, copy.deepcopy, through_pickle])
def test_a_sample_has_the_same_features_in_every_epoch(copied) -> None:
    net, x = copied(probed()[0]), torch.randn(4, 5)
    outputs = []
    for _ in range(3):
        net.train()
        outputs.append((net(x).detach(), net.features.clone()))
    assert all(torch.equal(features, outputs[0][1]) for _, features in outputs)
    assert not torch.equal(outputs[0][0], outputs[1][0])  # the head's own dropout is at work
    assert net.head.training
    assert net.head[0].training


def test_nothing_but_the_head_changes_by_a_bit() -> None:
    net, adaptation = probed()
    before = copy.deepcopy(net.state_dict())
    batches = [(torch.randn(4, 5), torch.randint(3, (4,))) for _ in range(5)]
    adaptation.start()
    net.train()
    train(net, adaptation, optimizer_of(net), batches)
    moved = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"head.1.weight", "head.1.bias"}


def test_evaluation_is_evaluation() -> None:
    net, _ = probed()
    net.eval()
    x = torch.randn(4, 5)
    assert torch.equal(net(x), net(x))
    assert not net.head.training


def test_parts_that_are_called_alone_are_refused() -> None:
    net, adaptation = probed()
    adaptation.start()
    net.head(net.body(torch.randn(4, 5))).sum().backward()
    with pytest.raises(UserError, match=mentions("LinearProbe", "net(...)")):
        adaptation.before_optimizer(1)
    net(torch.randn(4, 5)).sum().backward()
    adaptation.before_optimizer(1)


def test_training_without_a_head_is_refused() -> None:
    net = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 3))
    adaptation = Adaptation(net, LinearProbe())
    for train_it in (
        lambda: adaptation.param_groups(lr=0.1),
        lambda: adaptation.attach(torch.optim.SGD(net.parameters(), lr=0.1), last_step=1),
    ):
        with pytest.raises(UserError, match=mentions("LinearProbe", "trainable", "['head']")):
            train_it()
    head = nn.Linear(3, 2)  # which may lie beside the network
    adaptation.attach(torch.optim.SGD(head.parameters(), lr=0.1), last_step=1)
