"""The order of training is exact: a function of (seed, epoch) that any position resumes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from srlora_pl.data.base import DataModule, KeyedDataset, split_keys
from srlora_pl.data.images.datamodule import ImageData
from srlora_pl.data.loader import Key, user_error_as_batch
from srlora_pl.data.protocols import Batch
from srlora_pl.data.splits import stratified_split
from srlora_pl.util.errors import UserError
from srlora_pl.util.files import is_hub_name
from tests.helpers.data import Recorder, attach
from tests.helpers.errors import mentions


class Numbers(KeyedDataset):
    """Sample i is the number i; sample `broken` cannot be read."""

    def __init__(self, count: int, broken: int = -1) -> None:
        self.count, self.broken = count, broken

    def __len__(self) -> int:
        return self.count

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        index, epoch = split_keys(keys)
        if self.broken in index:
            return user_error_as_batch(UserError(f"Sample {self.broken} is broken; replace it."))
        return {"index": index, "epoch": epoch}


class NumberData(DataModule):
    num_classes, class_names = 2, ["odd", "even"]

    def __init__(self, count: int, batch_size: int, num_workers: int = 0, broken: int = -1) -> None:
        super().__init__(batch_size, 0.0, 0, num_workers)
        self.count, self.broken = count, broken

    def load(self, stage: str) -> None:
        self.train_set = Numbers(self.count, self.broken)


def epochs(data: Any, first: int, count: int) -> list[list[int]]:
    """Batches of ``count`` epochs from micro-batch ``first`` on, the trainer's counter going along."""
    progress = data.trainer.fit_loop.epoch_loop.batch_progress.total
    progress.processed, batches = first, []
    loader = data.train_dataloader()
    while progress.processed < count * data.batches_per_epoch:
        epoch = progress.processed // data.batches_per_epoch
        for batch in loader:
            assert batch["epoch"].unique().tolist() == [epoch]
            batches.append(batch["index"].tolist())
            progress.processed += 1
    return batches


class Labelled(Numbers):
    """The even ones of twice as many samples."""

    def __init__(self, labels: Any) -> None:
        self.labels = torch.tensor(labels)
        super().__init__(len(labels) // 2)
        self.rows = torch.arange(0, len(labels), 2)


def described(names: list[str], labels: Any, **left_out: int) -> str:
    data = NumberData(8, 2)
    data.class_names, data.num_classes, data.left_out = names, len(names) or 1, left_out
    data.train_set, data.val_set = Labelled(labels), [Numbers(1000), Numbers(234)]
    return data.description()


def test_a_description_counts_the_classes_of_the_split_in_the_order_of_the_outputs() -> None:
    labels = [2, 0, 2, 0, 0, 0, 2, 1]  # the odd ones are held out
    expected = "data: 4 to train on, 1,234 to validate; 3 classes: owl (1), cat (0), dog (3)"
    assert described(["owl", "cat", "dog"], labels) == expected


def test_a_description_of_several_classes_a_sample() -> None:
    several = [[0.0, 1.0], [1.0, 1.0], [1.0, 1.0], [0.0, 0.0]]
    assert described(["a", "b"], several).endswith("2 classes: a (1), b (2)")


def test_a_description_of_numbers() -> None:
    assert described([], [2.5, 9.0, 0.25, 9.0]) == "data: 2 to train on, 1,234 to validate; labels from 0.25 to 2.5"


def test_a_description_is_one_line_and_cut_after_ten_classes() -> None:
    names = ["two\nlines", *"bcdefghijkl"]
    line = described(names, [0, 0], **{f"kind {i}": i for i in range(1, 13)}, hidden=1500)
    assert line.endswith(
        "12 classes: 'two\\nlines' (1), b (0), c (0), d (0), e (0), f (0), g (0), h (0), i (0), j (0) and 2 more; "
        "left out: 1,500 hidden, " + "".join(f"{i} kind {i}, " for i in range(12, 3, -1)) + "6 others"
    )


def test_a_description_of_nothing() -> None:
    assert NumberData(8, 2).description() == "data: none; 2 classes: odd, even"


def test_a_description_is_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    data = attach(NumberData(8, 2))
    data.setup("fit")
    data.setup("fit")
    expected = "data: 8 to train on; 2 classes: odd, even; nothing is tested, as there is no labelled test split\n"
    assert capsys.readouterr().out == expected


@settings(deadline=None, max_examples=30)
@given(
    count=st.integers(1, 40), batch_size=st.integers(1, 9), limit=st.sampled_from([1.0, 0.5, 3]), share=st.floats(0, 1)
)
def test_any_position_resumes(count: int, batch_size: int, limit: Any, share: float) -> None:
    if count < batch_size or (limit == 0.5 and -(-count // batch_size) < 2):
        return
    data = attach(NumberData(count, batch_size), limit=limit)
    data.setup("fit")
    whole = epochs(data, 0, 3)
    position = min(int(share * len(whole)), len(whole))
    assert epochs(data, position, 3) == whole[position:]

    if limit == 1.0:
        for epoch in torch.tensor([i for batch in whole for i in batch]).view(3, count):
            assert epoch.sort().values.tolist() == list(range(count))


def test_order_depends_on_seed_and_epoch_and_on_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    data = attach(NumberData(50, 8))
    data.setup("fit")
    first = epochs(data, 0, 2)
    assert first[:7] != first[7:]
    torch.manual_seed(123)
    assert epochs(data, 0, 2) == first
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    assert epochs(data, 0, 2) != first


def test_an_iterator_leaves_the_global_generator_alone() -> None:
    data = attach(NumberData(20, 4))
    data.setup("fit")
    before = torch.get_rng_state()
    list(data.train_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


def test_the_position_is_read_when_the_iterator_is_made() -> None:
    data = attach(NumberData(20, 4), processed=7)
    data.setup("fit")
    iterator = iter(data.train_dataloader())
    data.trainer.fit_loop.epoch_loop.batch_progress.total.processed = 0
    assert next(iterator)["index"].tolist() == data.train_order(1)[8:12].tolist()


def test_overfitting_repeats_its_batches() -> None:
    data = attach(NumberData(20, 4), limit=2, overfit_batches=2)
    data.setup("fit")
    batches = epochs(data, 0, 2)
    assert batches[:2] == batches[2:]


@pytest.mark.parametrize("count", [48, 50])
def test_devices_share_one_order(count: int) -> None:
    alone = attach(NumberData(count, 8))
    alone.setup("fit")
    ranks = [attach(NumberData(count, 4), global_rank=rank, world_size=2) for rank in (0, 1)]
    for data in ranks:
        data.setup("fit")
    together = [sorted(a + b) for a, b in zip(*(epochs(data, 0, 1) for data in ranks), strict=True)]
    assert together == [sorted(batch) for batch in epochs(alone, 0, 1)]


# -- with Lightning


def recorded(data: ImageData, steps: int, path: Path, resume: Path | None = None, **options: Any) -> Recorder:
    L.seed_everything(3)
    model = Recorder(size=8)
    trainer = L.Trainer(
        max_steps=steps,
        max_epochs=20,  # without it Lightning does not ask the loader how many steps there are
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(model, data, ckpt_path=resume)
    trainer.save_checkpoint(path)
    return model


def digits(**options: Any) -> ImageData:
    return ImageData("digits", **{"batch_size": 300, "val_fraction": 0.1, **options})  # 5 batches an epoch


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stop", [3, 5, 8])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_sees_what_the_uninterrupted_one_sees(tmp_path: Path, stop: int, workers: int) -> None:
    whole = recorded(digits(), 12, tmp_path / "whole.ckpt")
    recorded(digits(num_workers=workers), stop, tmp_path / "part.ckpt")
    rest = recorded(digits(num_workers=workers), 12, tmp_path / "rest.ckpt", resume=tmp_path / "part.ckpt")
    assert rest.seen == whole.seen[stop:]
    assert torch.equal(rest.head.weight, whole.head.weight)


@pytest.mark.filterwarnings("ignore")
def test_limits_and_a_second_fit_of_one_object(tmp_path: Path) -> None:
    options: dict[str, Any] = {"limit_train_batches": 0.5}  # 2 of 5
    data = digits()
    whole = recorded(data, 7, tmp_path / "whole.ckpt", **options)
    recorded(data, 3, tmp_path / "part.ckpt", **options)
    rest = recorded(data, 7, tmp_path / "rest.ckpt", resume=tmp_path / "part.ckpt", **options)
    assert rest.seen == whole.seen[3:]
    # A fit that was refused must leave no position behind for the next one.
    data._resumed = 3
    assert recorded(data, 7, tmp_path / "again.ckpt", **options).seen == whole.seen


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"batch_size": 200}, ["data.batch_size", "300", "200"]),
        ({"val_fraction": 0.2}, ["data.val_fraction", "0.1"]),
        ({"seed": 1}, ["data.seed", "0"]),
    ],
)
def test_another_order_is_refused(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    recorded(digits(), 3, tmp_path / "part.ckpt")
    with pytest.raises(UserError, match=mentions(*named)):
        recorded(digits(**change), 6, tmp_path / "rest.ckpt", resume=tmp_path / "part.ckpt")


@pytest.mark.filterwarnings("ignore")
def test_evaluation_takes_any_checkpoint(tmp_path: Path) -> None:
    model = recorded(digits(), 3, tmp_path / "part.ckpt")
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    trainer.validate(model, digits(batch_size=64), ckpt_path=tmp_path / "part.ckpt", verbose=False)


# -- errors


@pytest.mark.parametrize("workers", [0, 2])
def test_a_workers_error_is_one_sentence(workers: int) -> None:
    data = attach(NumberData(20, 4, workers, broken=7))
    data.setup("fit")
    with pytest.raises(UserError) as caught:
        list(data.train_dataloader())
    assert str(caught.value) == "Sample 7 is broken; replace it."


@pytest.mark.parametrize("batch_size", [0, -1])
def test_batch_size_below_one(batch_size: int) -> None:
    with pytest.raises(UserError, match=mentions("data.batch_size", batch_size)):
        NumberData(10, batch_size)


def test_batch_size_above_the_data() -> None:
    with pytest.raises(UserError, match=mentions("data.batch_size", "11", "10")):
        attach(NumberData(10, 11)).setup("fit")


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_val_fraction_out_of_range(fraction: float) -> None:
    with pytest.raises(UserError, match=mentions("data.val_fraction")):
        digits(val_fraction=fraction)


def test_head_of_another_size() -> None:
    data = attach(NumberData(10, 2))
    data.trainer.lightning_module.num_classes = 5
    with pytest.raises(UserError, match=mentions("5 classes", "2")):
        data.setup("fit")


# -- split


@settings(deadline=None)
@given(labels=st.lists(st.integers(0, 4), min_size=1, max_size=60), fraction=st.floats(0, 0.9), seed=st.integers(0, 9))
def test_split_is_disjoint_complete_and_proportional(labels: list[int], fraction: float, seed: int) -> None:
    classes = torch.tensor(labels)
    kept, held = stratified_split(classes, fraction, seed)
    assert sorted(kept.tolist() + held.tolist()) == list(range(len(labels)))
    for count, out in zip(classes.bincount(), classes[held].bincount(minlength=5), strict=False):
        assert abs(out - fraction * count) <= 1
        assert count == 0 or out < count
    again = stratified_split(classes, fraction, seed)
    assert torch.equal(held, again[1])


def test_split_has_its_size_and_follows_its_seed() -> None:
    classes = torch.arange(10).repeat_interleave(15)
    held = [stratified_split(classes, 0.1, seed)[1] for seed in (0, 1)]
    assert [len(rows) for rows in held] == [15, 15]  # not 10 times round(1.5)
    assert not torch.equal(*held)


@pytest.mark.parametrize("root", ["glue/", "./glue", "/data", "~/data", "../data", "a/b/c", "glue", "/"])
def test_a_missing_folder_is_no_hub_name(root):
    assert not is_hub_name(root)
    assert is_hub_name("nyu-mll/glue")
