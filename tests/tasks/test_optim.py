import math

import pytest
import torch
from torch import nn
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from srlora_pl.tasks.optim import build_optimizer, optimizer_class, schedule_factor
from srlora_pl.util.errors import UserError
from tests.helpers.errors import mentions


@pytest.mark.parametrize(
    ("schedule", "reference"),
    [("cosine", get_cosine_schedule_with_warmup), ("linear", get_linear_schedule_with_warmup)],
)
@pytest.mark.parametrize("warmup", [0, 1, 7, 19])
def test_schedules_equal_those_of_transformers(schedule, reference, warmup):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = reference(optimizer, warmup, 20)
    for step in range(21):
        assert schedule_factor(schedule, step, 20, warmup) * 2.0 == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()


def test_schedule_closed_form():
    assert schedule_factor("cosine", 5, 500, 10) == 0.5
    assert schedule_factor("cosine", 10, 500, 10) == 1.0
    assert schedule_factor("cosine", 255, 500, 10) == pytest.approx(0.5)
    assert schedule_factor("cosine", 132, 500, 10) == pytest.approx(0.5 * (1 + math.cos(math.pi * 122 / 490)))
    assert schedule_factor("linear", 255, 500, 10) == 0.5
    assert [schedule_factor("constant", step, 500, 2) for step in (0, 1, 2, 499)] == [0.0, 0.5, 1.0, 1.0]
    assert schedule_factor("cosine", 501, 500, 10) == schedule_factor("linear", 501, 500, 10) == 0.0


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_a_run_may_be_all_warmup(schedule):
    assert [schedule_factor(schedule, step, 4, 4) for step in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_optimizers_by_name_and_by_path():
    groups = [{"params": [nn.Parameter(torch.zeros(2, 2))], "lr": 0.3, "weight_decay": 0.1}]
    sgd = build_optimizer("sgd", groups, 0.1, 0.8, scaled_gradients=False)
    assert type(sgd) is torch.optim.SGD
    assert (sgd.param_groups[0]["lr"], sgd.param_groups[0]["momentum"], sgd.defaults["fused"]) == (0.3, 0.8, None)
    nadam = build_optimizer("torch.optim.NAdam", groups, 0.1, 0.8, scaled_gradients=False)
    assert type(nadam) is torch.optim.NAdam
    assert nadam.param_groups[0]["weight_decay"] == 0.1


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("adamW", ["'adamw'"]),
        ("torch.optim.NAdm", ["'torch.optim.NAdam'"]),
        ("torch.nn.Linear", ["model.optimizer", "'torch.nn.Linear'"]),
        ("nosuch.module.Adam", ["model.optimizer", "'nosuch.module.Adam'"]),
    ],
)
def test_unknown_optimizers_are_refused(name, words):
    with pytest.raises(UserError, match=mentions(*words)):
        optimizer_class(name)


def test_an_optimizer_that_cannot_do_what_is_asked_is_refused():
    two = [{"params": [nn.Parameter(torch.zeros(1))], "lr": 0.1, "weight_decay": decay} for decay in (0.0, 0.1)]
    with pytest.raises(UserError, match=mentions("'torch.optim.Rprop'", "model.weight_decay", "0")):
        build_optimizer("torch.optim.Rprop", two, 0.1, 0.9, scaled_gradients=False)
    with pytest.raises(UserError, match=mentions("'torch.optim.LBFGS'")):
        build_optimizer("torch.optim.LBFGS", two, 0.1, 0.9, scaled_gradients=False)
