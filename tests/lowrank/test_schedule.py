import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srlora_pl.lowrank import Schedule

# method: r = 8, gamma = 0.5, the paper's epochs and batch sizes (Table 2): N_all, r_target, planned, done, interval
TABLE = {
    "SST-2": (84_200, 512, 126, 125, 668.3),
    "MRPC": (2_300, 256, 62, 61, 37.1),
    "CoLA": (10_700, 256, 62, 61, 172.6),
    "QNLI": (32_740, 128, 30, 29, 1_091.3),
    "RTE": (7_800, 16, 2, 1, 3_900.0),
    "STS-B": (14_380, 32, 6, 5, 2_396.7),
}


@pytest.mark.parametrize("task", TABLE)
def test_the_papers_tasks(task):
    steps, target, planned, done, interval = TABLE[task]
    schedule = Schedule(0, steps, (target - 8) // 4)
    assert (schedule.planned, schedule.to_do) == (planned, done)
    assert schedule.due(steps) == done
    assert round(steps / planned, 1) == interval
    switches = [t for t in range(1, steps + 1) if schedule.due(t) > schedule.due(t - 1)]
    assert switches == [i * steps // planned for i in range(1, planned)]


@given(
    first=st.integers(0, 1000),
    planned=st.integers(0, 300),
    extra=st.integers(0, 3000),
)
def test_switches_are_even_never_at_the_end_and_never_two_at_once(first, planned, extra):
    last = first + planned + extra
    schedule = Schedule(first, last, planned)
    due = [schedule.due(t) for t in range(first, last + 1)]
    assert due[0] == 0
    assert all(b - a in (0, 1) for a, b in itertools.pairwise(due))
    at = [t for t, (a, b) in enumerate(itertools.pairwise(due), start=first + 1) if b > a]
    assert at == [first + i * (last - first) // planned for i in range(1, planned)]
    assert at == [schedule.step_of(i) for i in range(1, planned)]
    assert last not in at
