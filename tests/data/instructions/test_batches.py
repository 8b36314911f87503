"""Batches to train on: every answer token once, in an order that resumes, with the tokens of the whole step."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from srlora_pl import InstructionData, UserError
from srlora_pl.data.instructions.sets import best_fit, tokens_of_steps
from srlora_pl.training.resume import ExactResume
from tests.helpers.errors import mentions
from tests.helpers.instructions import EOS, rows_of_lengths, save_tokenizer, trained, with_model, write

PADDINGS = ["buckets", "pack"]
TEMPLATE = "{prompt}:"


@pytest.fixture
def make(tmp_path: Path) -> Any:
    """The data of 41 samples of 5 to 80 tokens, once set up."""
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    file = write(tmp_path / "train.jsonl", rows_of_lengths())

    def _make(processed: int = 0, trainer: Any = None, rows: Any = None, **options: Any) -> Any:
        if rows is not None:
            write(file, rows)
        own = {"batch_size": 4, "val_fraction": 0, "max_length": 96, "cache_dir": str(tmp_path / "cache"), **options}
        data = with_model(InstructionData(str(file), template=TEMPLATE, **own), tokenizer, processed, **(trainer or {}))
        data.setup("fit")
        return data

    return _make


def batches_of(data: Any, epochs: int = 1) -> list[dict[str, Tensor]]:
    """All batches up to the end of an epoch, from where the run stands."""
    progress = data.trainer.fit_loop.epoch_loop.batch_progress.total
    found = []
    while progress.processed < epochs * data.batches_per_epoch:
        for batch in data.train_dataloader():
            found.append(batch)
            progress.processed += 1
    return found


def answers(data: Any) -> list[list[int]]:
    """The tokens of all answers to train on, without the package's own encoder."""
    texts = [sample.answer for sample in data.samples("train")]
    return [data.tokenizer(text, add_special_tokens=False)["input_ids"] + [EOS] for text in texts]


def same(first: list[dict[str, Tensor]], second: list[dict[str, Tensor]]) -> bool:
    return len(first) == len(second) and all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
        for a, b in zip(first, second, strict=True)
    )


# -- what is trained


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("padding", PADDINGS)
def test_every_answer_token_is_trained_once(padding: str, workers: int, make: Any) -> None:
    data = make(padding=padding, num_workers=workers)
    found = batches_of(data)
    rows = [tokens for batch in found for tokens in trained(batch)]
    if padding == "pack":  # several answers to a row, each with its end
        rows = [tokens for row in rows for tokens in (torch.tensor(row).tensor_split(_behind_ends(row)))[:-1]]
        rows = [row.tolist() for row in rows]
    assert sorted(rows) == sorted(answers(data))
    total = sum(map(len, answers(data)))
    assert sum(int(batch["step_tokens"]) for batch in found) == total  # without accumulation a batch is a step
    for batch in found:
        assert batch["input_ids"].dtype == batch["labels"].dtype == batch["step_tokens"].dtype == torch.int64
        assert batch["step_tokens"].ndim == 0
        assert batch["input_ids"].shape[1] % 8 == 0
        assert "attention_mask" not in batch
        after = torch.cat([batch["labels"].flatten(), torch.tensor([-100])])[batch["predicts"] + 1]
        assert after.tolist() == [token for row in trained(batch) for token in row]


def _behind_ends(row: list[int]) -> Tensor:
    return (torch.tensor(row) == EOS).nonzero().flatten() + 1


def test_batches_hold_samples_of_similar_length(make: Any) -> None:
    data = make(batch_size=8)
    longest = [
        int(data.train_set.lengths[batch["index"]].max()) - int(data.train_set.lengths[batch["index"]].min())
        for batch in batches_of(data)
    ]
    lengths = data.train_set.lengths
    assert int(lengths.max() - lengths.min()) > 60
    assert sum(longest) / len(longest) < 25
    assert all(batch["input_ids"].shape[1] - int(lengths[batch["index"]].max()) < 8 for batch in batches_of(data))


def test_prompts_are_trained_as_well_if_asked_for(make: Any) -> None:
    data = make(train_on="all")
    for batch in batches_of(data):
        for ids, labels, row in zip(batch["input_ids"], batch["labels"], batch["index"], strict=True):
            length = int(data.train_set.lengths[row])
            assert labels[0] == -100  # nothing predicts it
            assert torch.equal(labels[1:length], ids[1:length])
            assert (labels[length:] == -100).all()


def test_samples_that_are_too_long(
    make: Any, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": "z" * p, "answer": "k" * a} for p, a in ((2, 2), (30, 2), (2, 30), (3, 3), (9, 9))]
    with caplog.at_level("INFO"):
        dropped = make(rows=rows, max_length=24, batch_size=1)
    assert "2 of the 5 samples in 'train' (40.0%)" in caplog.text
    assert "were dropped" in caplog.text
    assert dropped.train_set.rows.tolist() == [0, 3, 4]
    assert "data: 3 to train on" in capsys.readouterr().out
    caplog.clear()
    with caplog.at_level("INFO"):
        cut = make(rows=rows, max_length=24, batch_size=1, too_long="cut")
    assert "were cut, 1 of them dropped, as nothing of their answers was left" in caplog.text
    assert cut.train_set.rows.tolist() == [0, 2, 3, 4]
    batch = cut.train_set.__getitems__([(1, 0)])
    assert batch["input_ids"].shape == (1, 24)
    assert EOS not in batch["input_ids"]
    assert 0 < int(batch["step_tokens"]) == (batch["labels"] >= 0).sum() < 30
    with pytest.raises(UserError, match=mentions("2 of the 5", "data.max_length", "line 2", "data.too_long")):
        make(rows=rows, max_length=24, batch_size=1, too_long="error")
    for too_long in ("drop", "cut"):
        with pytest.raises(UserError, match=mentions("No sample", "'train'", "data.max_length", 3)):
            make(rows=rows, max_length=3, batch_size=1, too_long=too_long)


def test_a_run_begins_with_a_sample_and_the_shares(make: Any, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "Nina?", "answer": "blue"}] + [{"prompt": "z" * 9, "answer": "k" * 4}] * 5
    data = make(rows=rows, batch_size=2, trainer={"accumulate_grad_batches": 2})
    out = capsys.readouterr().out
    assert "\n    <s>Nina?:>>>blue</s><<<\n" in out
    share = int(data.train_set.trained_tokens.sum()) / int(data.train_set.lengths.sum())
    assert f"{share:.1%} of {int(data.train_set.lengths.sum())} tokens are trained" in out
    assert f"about {round(int(data.train_set.trained_tokens.sum()) * 4 / 6)} trained" in out


# -- the tokens of a step


DIVISIONS = [(1, 8, 1), (2, 4, 1), (8, 1, 1), (4, 1, 2), (1, 4, 2)]


@pytest.mark.parametrize("padding", PADDINGS)
def test_a_step_is_the_same_however_it_is_divided(padding: str, make: Any) -> None:
    """8 samples a step; the last step of an epoch has fewer."""
    rows, steps = rows_of_lengths(44), []
    for batch_size, accumulate, world in DIVISIONS:
        ranks = []
        for rank in range(world):
            trainer = {"accumulate_grad_batches": accumulate, "world_size": world, "global_rank": rank}
            data = make(rows=rows, padding=padding, batch_size=batch_size, trainer=trainer)
            ranks.append(batches_of(data, 2))
            per_epoch = data.batches_per_epoch
        found = []
        for epoch in range(2):
            for first in range(0, per_epoch, accumulate):
                window = range(epoch * per_epoch + first, epoch * per_epoch + min(first + accumulate, per_epoch))
                batches = [rank[place] for rank in ranks for place in window]
                tokens = {int(batch["step_tokens"]) for batch in batches}
                assert tokens == {sum(int((batch["labels"] >= 0).sum()) for batch in batches)}
                found.append((sorted(row for batch in batches for row in trained(batch) if row), *tokens))
        steps.append(found)
    if padding == "buckets":  # else an odd number of rows is filled up for two devices
        assert all(each == steps[0] for each in steps)
    assert steps[0] == steps[1] == steps[2]
    assert steps[0][0] != steps[0][len(steps[0]) // 2]


def test_an_epoch_that_ends_early_has_a_short_last_step() -> None:
    tokens = torch.tensor([1, 2, 3, 4, 5, 6, 7])
    assert tokens_of_steps(tokens, 1, 7, 3) == [6, 6, 6, 15, 15, 15, 7]
    assert tokens_of_steps(tokens, 2, 3, 2) == [10, 10, 11]
    assert tokens_of_steps(tokens, 2, 4, 2) == [10, 10, 18, 18]
    assert tokens_of_steps(tokens, 4, 2, 1) == [10, 18]


def test_a_batch_that_no_sampler_asks_for_counts_its_own_tokens(make: Any) -> None:
    for padding in PADDINGS:
        data = make(padding=padding)
        (batch,) = list(data.sampled_batches(3))
        assert [tokens.count(EOS) for tokens in trained(batch)] == [1, 1, 1]  # samples, not rows of several
        for each in (batch, data.trial_batch()):
            assert each["step_tokens"] == (each["labels"] >= 0).sum()


# -- packs


@settings(deadline=None, max_examples=60)
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=80), capacity=st.integers(50, 90))
def test_best_fit_decreasing(lengths: list[int], capacity: int) -> None:
    lengths = sorted(lengths, reverse=True)
    bins = best_fit(lengths, capacity)
    loads = [0] * (max(bins) + 1)
    for length, chosen in zip(lengths, bins, strict=True):
        fits = [load for load in loads if load + length <= capacity and load]
        assert loads[chosen] == max(fits, default=0)  # the fullest that takes it, else a new one
        loads[chosen] += length
    assert max(loads) <= capacity
    assert min(loads) > 0


def test_packs_hold_every_sample_once_and_are_as_many_in_every_epoch(make: Any) -> None:
    data = make(padding="pack")
    packs = data.train_set
    assert len(packs) < 41 / 1.5
    for epoch in range(3):
        members = packs.members(epoch)
        assert torch.cat(list(members)).sort().values.tolist() == list(range(41))
        assert len(members) == len(packs)
        assert all(packs.samples.lengths[each].sum() <= 96 for each in members)
    two = [{tuple(each.tolist()) for each in packs.members(epoch)} for epoch in (0, 1)]
    assert two[0] != two[1]


def test_a_packed_row_is_its_samples_one_after_the_other(make: Any) -> None:
    data = make(padding="pack")
    members = data.train_set.members(1)
    batch = data.train_set.__getitems__([(pack, 1) for pack in range(len(members))])
    padded = []
    for row, pack in enumerate(members):
        place = 0
        for sample in pack.tolist():
            alone = data.train_set.samples.__getitems__([(sample, 1)])
            length = int(data.train_set.samples.lengths[sample])
            here = slice(place, place + length)
            assert torch.equal(batch["input_ids"][row, here], alone["input_ids"][0, :length])
            assert torch.equal(batch["labels"][row, here], alone["labels"][0, :length])
            assert batch["labels"][row, place] == -100
            assert batch["position_ids"][row, here].tolist() == list(range(length))
            place += length
        padded.append(rest := batch["position_ids"].shape[1] - place)
        assert batch["position_ids"][row, place:].tolist() == list(range(rest))
        assert (batch["labels"][row, place:] == -100).all()
    assert max(padded) > 8


# -- order and resume


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("padding", PADDINGS)
def test_any_position_resumes(padding: str, accumulate: int, make: Any) -> None:
    trainer = {"accumulate_grad_batches": accumulate}
    whole = batches_of(make(padding=padding, trainer=trainer), 3)
    for position in (1, 5, len(whole) // 3, len(whole) // 3 + 2, len(whole) - 1):
        assert same(batches_of(make(position, padding=padding, trainer=trainer), 3), whole[position:])


@pytest.mark.parametrize("padding", PADDINGS)
def test_the_order_depends_on_seed_and_epoch_alone(padding: str, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make(padding=padding)
    whole = batches_of(data, 2)
    half = len(whole) // 2
    assert not same(whole[:half], whole[half:])
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert same(batches_of(make(padding=padding), 2), whole)
    assert torch.equal(torch.get_rng_state(), state)
    fixed = make(padding=padding, trainer={"overfit_batches": 2})
    again = batches_of(fixed, 2)
    assert same(again[:half], again[half:])
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    assert not same(batches_of(make(padding=padding), 2), whole)


class Recorder(ExactResume, L.LightningModule):
    """Keeps the batches of each step, and what they say of it."""

    def __init__(self, tokenizer: str) -> None:
        super().__init__()
        self.backbone_name, self.weight = tokenizer, nn.Parameter(torch.zeros(1))
        self.seen: list[tuple[list[list[int]], int]] = []
        self.steps: list[tuple[set[int], int]] = []  # what the batches of a step say, and what they have
        self._window: list[tuple[int, int]] = []

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        self.seen.append((batch["labels"].tolist(), int(batch["step_tokens"])))
        self._window.append((int(batch["step_tokens"]), int((batch["labels"] >= 0).sum())))
        return (self.weight * batch["labels"].double().sum()).sum()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        said, have = zip(*self._window, strict=True)
        self.steps.append((set(said), sum(have)))
        self._window = []

    def validation_step(self, *_: Any) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        assert self.trainer.estimated_stepping_batches > 0
        return torch.optim.SGD(self.parameters(), lr=1e-6)


def fitted(tmp_path: Path, steps: int, padding: str, resume: str | None = None, **options: Any) -> Recorder:
    L.seed_everything(3)
    own = {"template": TEMPLATE, "batch_size": 3, "max_length": 96, "cache_dir": str(tmp_path / "cache")}
    data = InstructionData(str(tmp_path / "train.jsonl"), padding=padding, **own, **options)
    model = Recorder(str(tmp_path / "tokenizer"))
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"enable_checkpointing": False, "accelerator": "cpu", "default_root_dir": tmp_path}
    trainer = L.Trainer(max_steps=steps, max_epochs=20, accumulate_grad_batches=3, **quiet)
    trainer.fit(model, data, ckpt_path=resume and tmp_path / resume)
    trainer.save_checkpoint(tmp_path / f"{steps}.ckpt")
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("padding", PADDINGS)
def test_a_resumed_run_trains_on_what_the_uninterrupted_one_does(tmp_path: Path, padding: str) -> None:
    """Over three epochs, each of which ends in a step of fewer batches; stopped within the second one."""
    save_tokenizer(tmp_path / "tokenizer")
    write(tmp_path / "train.jsonl", rows_of_lengths(45))
    whole = fitted(tmp_path, 11, padding)
    part, rest = fitted(tmp_path, 6, padding), fitted(tmp_path, 11, padding, "6.ckpt", num_workers=1)
    assert part.seen + rest.seen == whole.seen
    for said, have in whole.steps:
        assert said == {have}
    with pytest.raises(UserError, match=mentions("tokens to train on")):
        fitted(tmp_path, 11, padding, "6.ckpt", train_on="all")
