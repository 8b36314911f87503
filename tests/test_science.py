"""The benchmarks of where SRLoRA wins: their task, their search for rates, and the directions that they try."""

import argparse
import json
import math

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import rank_gap, search
from benchmarks.science import verdict
from benchmarks.science.tokens import MaskedTokens, TokenData
from srlora_pl import LoRA
from srlora_pl.util.errors import UserError
from srlora_pl.util.randomness import run_seed

TRAIN, TEST, LENGTH, WIDTH = 40, 6, 5, 192


@pytest.fixture
def file(tmp_path):
    generator = torch.Generator().manual_seed(0)
    features = {
        "train": torch.randn(2, TRAIN, LENGTH, WIDTH, generator=generator) * 3 + 1,
        "test": torch.randn(TEST, LENGTH, WIDTH, generator=generator),
    }
    save_file({name: each.half() for name, each in features.items()}, tmp_path / "tokens.safetensors")
    return tmp_path / "tokens.safetensors"


@pytest.fixture
def data(file):
    made = TokenData(str(file), batch_size=8, val_fraction=0.25)
    made.setup("fit")
    made.setup("test")
    return made


def test_half_of_the_tokens_but_never_the_first_are_left_out(data):
    batch = data.train_set.__getitems__([(index, 0) for index in range(30)])
    masked = batch["masked"]
    assert not masked[:, 0].any()
    assert masked[:, 1:].double().mean() == pytest.approx(0.5, abs=0.12)
    plain = data.features["train"].float()[:, data.train_set.rows[batch["index"]]]
    is_view = (batch["tokens"][:, 0] == plain[:, :, 0]).all(-1)  # (views, 30)
    assert is_view.any(0).all()
    assert is_view.any(1).all()
    shown = plain[is_view.long().argmax(0), torch.arange(30)]
    assert torch.equal(batch["tokens"], torch.where(masked[..., None], data.mean, shown))
    features = data.features["train"][:, ::10].double()
    deviation = features.flatten(0, 1).std(0, correction=0).square().mean(0).sqrt()  # of all positions together
    torch.testing.assert_close(batch["target"].double(), (shown - features.mean((0, 1))) / deviation, rtol=0, atol=1e-5)


def test_masks_of_training_follow_seed_and_epoch_and_those_of_a_score_nothing(data, monkeypatch):
    def masks(which, keys, seed):
        monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
        assert run_seed() == seed
        return which.__getitems__(keys)["masked"]

    keys = [(index, 1) for index in range(8)]
    first = masks(data.train_set, keys, 5)
    assert torch.equal(first, masks(data.train_set, keys, 5))
    assert not torch.equal(first, masks(data.train_set, [(index, 2) for index in range(8)], 5))
    assert not torch.equal(first, masks(data.train_set, keys, 6))
    for held in (data.val_set, data.test_set):
        assert torch.equal(masks(held, [0, 3], 5), masks(held, [0, 3], 6))


def test_the_loss_is_the_mean_squared_error_of_what_is_left_out(data):
    task = MaskedTokens("vit_tiny_in64", LoRA(rank=2), first_block=5).eval()
    batch = data.test_set.__getitems__([0, 1, 2])
    errors = [
        (task.net(batch["tokens"])[i, t] - batch["target"][i, t]).square().mean()
        for i in range(3)
        for t in range(LENGTH)
        if batch["masked"][i, t]
    ]
    torch.testing.assert_close(task.training_loss(batch), torch.stack(errors).mean())
    scores = task.evaluation
    scores.reset("test")
    for indices in ([0], [1, 2]):  # of unequal numbers of tokens
        scores.update(task, "test", data.test_set.__getitems__(indices))
    found = scores.compute("test")
    torch.testing.assert_close(found["loss"], torch.stack(errors).mean())
    assert found["score"] == 1 - found["loss"]


def test_without_its_file_the_data_say_how_to_write_it(tmp_path):
    with pytest.raises(UserError, match="write it with python -m benchmarks"):
        TokenData(str(tmp_path / "none.safetensors"))


class Valley(search.Search):
    """A search whose losses are known."""

    def __init__(self, best, failing=()):
        super().__init__(argparse.Namespace(seeds=(0, 1)), "lora", (), None)
        self.valley, self.failing = best, failing

    def _loss(self, rate, seed):
        return math.inf if rate in self.failing else abs(math.log2(rate / self.valley)) + 0.1 * seed


@pytest.mark.parametrize("best", [0.25, 1.0, 16.0])
def test_a_search_goes_on_until_the_best_rate_lies_inside(best):
    found = Valley(best)
    assert found.best([1.0, 2.0]) == best
    assert min(found.losses) == min(best, 1.0) / (2 if best <= 1 else 1)
    assert max(found.losses) == max(best, 1.0) * 2


def test_a_search_turns_at_a_rate_that_diverges_and_ends_somewhere():
    assert Valley(64.0, failing={8.0}).best([1.0, 2.0]) == 4.0
    endless = Valley(2.0**-30)
    assert endless.best([1.0, 2.0]) == 2.0**-6


def test_a_rate_that_is_out_with_the_first_seed_is_not_tried_with_the_others():
    found = Valley(2.0)
    found.valley = 2.02  # a loss of 0.014 at 2.0
    assert found.best([1.0, 2.0]) == 2.0
    assert {rate: sorted(losses) for rate, losses in found.losses.items()} == {1.0: [0, 1], 2.0: [0, 1], 4.0: [0]}


def test_the_gap_of_a_rank_is_paired_by_seed():
    assert rank_gap.gap([1.0, 2.0, 3.0], [0.5, 1.5, 2.5]) == (0.5, 0.0)
    assert rank_gap.gap([1.0, 2.0, 3.0], [1.0, 1.0, 1.0]) == (1.0, 1.0)


def test_the_tests_of_a_verdict_are_corrected_for_their_number(tmp_path, monkeypatch, capsys):
    assert verdict.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    scores = {"lora": (0.50, 0.52, 0.54), "pissa": (0.61, 0.58, 0.66), "srlora": (0.60, 0.6201, 0.64)}
    rows = [f"{method},{seed},{score}" for method, given in scores.items() for seed, score in enumerate(given)]
    (tmp_path / "results.csv").write_text("\n".join(["method,seed,test/score", *rows]) + "\n")
    monkeypatch.setattr("sys.argv", ["verdict", "--method", "srlora", "--against", "lora,pissa", str(tmp_path)])
    verdict.main()
    first, second = json.loads(capsys.readouterr().out.splitlines()[-1])["comparisons"]
    assert (first["other"], second["other"]) == ("lora", "pissa")
    assert (first["n"], first["mean"], second["mean"]) == (
        3,
        pytest.approx(0.100033, abs=1e-6),
        pytest.approx(0.0034, abs=1e-4),
    )
    assert first["corrected"] == pytest.approx(2 * first["p"])
    assert first["p"] < 0.01 < second["p"] == second["corrected"]
