"""What the package promises before anything runs."""

import sys
from importlib import import_module

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import srlora_pl
from srlora_pl.util.randomness import derive, uniform
from tests.helpers.errors import mentions
from tests.helpers.waiting import run


def test_the_maths_loads_no_lightning():
    code = "import sys, srlora_pl.lowrank; print(*{'lightning', 'transformers', 'timm'} & set(sys.modules))"
    out = run([sys.executable, "-c", code], check=True)
    assert out.stdout.strip() == ""


def test_every_public_name_can_be_had():
    for name in srlora_pl.__all__:
        assert getattr(srlora_pl, name).__name__ == name
    with pytest.raises(AttributeError, match=mentions("'SRLora'", "attribute")):
        _ = srlora_pl.SRLora


@pytest.mark.parametrize(
    "path",
    [
        "srlora_pl.checkpoints.read",
        "srlora_pl.comparison.results.Difference",
        "srlora_pl.data.labels.class_names",
        "srlora_pl.data.sources.find_source",
        "srlora_pl.data.transforms.ImageTransform",
        "srlora_pl.export.export_model",
        "srlora_pl.figures.direction_intervals",
        "srlora_pl.figures.training_loss",
        "srlora_pl.lowrank.export.plain_copy",
        "srlora_pl.lowrank.precision.full_precision",
        "srlora_pl.lowrank.recompose.lowest",
        "srlora_pl.tasks.backbones.build_backbone",
    ],
)
def test_a_path_that_was_shown_once_still_leads_there(path):
    module, _, name = path.rpartition(".")
    assert getattr(import_module(module), name).__name__ == name


@given(
    seed=st.integers(0, 2**63 - 1), keys=st.lists(st.tuples(st.integers(0, 2**40), st.integers(0, 2**40)), min_size=1)
)
def test_uniform_depends_on_each_row_alone(seed, keys):
    table = torch.tensor(keys)
    together = uniform(seed, table, 3)
    assert torch.equal(together, torch.cat([uniform(seed, row[None], 3) for row in table]))
    assert (together >= 0).all()
    assert (together < 1).all()


def test_uniform_is_uniform_and_independent():
    keys = torch.stack([torch.arange(200).repeat_interleave(500), torch.arange(500).repeat(200)], 1)
    draws = uniform(1, keys, 2)
    # five standard errors of 100,000 draws
    assert (draws.mean(0) - 0.5).abs().max() < 5 * (1 / 12) ** 0.5 / 100_000**0.5
    histogram = torch.histc(draws.float(), 20, 0, 1)
    assert (histogram - 10_000).abs().max() < 5 * 10_000**0.5
    # of a sample's two draws, its neighbour's, and the same sample's under another seed
    series = torch.stack([draws[1:, 0], draws[1:, 1], draws[:-1, 1], uniform(2, keys, 1)[1:, 0]])
    correlation = torch.corrcoef(series) - torch.eye(4)
    assert correlation.abs().max() < 5 / 100_000**0.5


def test_derived_seeds_differ():
    seeds = {derive(s, a, b) for s in range(10) for a in range(10) for b in range(10)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)
