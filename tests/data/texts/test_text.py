"""Batches of similar length in an order that is exact, and that changes nothing but the padding."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from srlora_pl import GLUEData, LoRA, TextClassifier, UserError
from srlora_pl.data.texts.datamodule import in_buckets
from srlora_pl.training.resume import ExactResume
from tests.helpers.encoders import BERT, DEBERTA, folder
from tests.helpers.errors import mentions
from tests.helpers.texts import W0, WORDS, cola, save_tokenizer, with_model


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    return save_tokenizer(tmp_path / "tokenizer")


@pytest.fixture
def root(tmp_path: Path) -> str:
    return str(cola(tmp_path / "glue"))


def small(root: str, **options: Any) -> GLUEData:
    """50 sentences to train on, in 7 batches."""
    cache = str(Path(root).parent / "cache")
    return GLUEData("cola", root, cache_dir=cache, **{"batch_size": 8, "max_length": 24, **options})


def epochs(data: Any, first: int, count: int) -> list[list[int]]:
    """Batches of ``count`` epochs from micro-batch ``first`` on, the trainer's counter going along."""
    progress = data.trainer.fit_loop.epoch_loop.batch_progress.total
    progress.processed, batches = first, []
    while progress.processed < count * data.batches_per_epoch:
        for batch in data.train_dataloader():
            batches.append(batch["index"].tolist())
            progress.processed += 1
    return batches


# -- order


@settings(deadline=None, max_examples=60)
@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=60), size=st.integers(1, 9), seed=st.integers(0, 3))
def test_buckets(lengths: list[int], size: int, seed: int) -> None:
    table, generator = torch.tensor(lengths), torch.Generator().manual_seed(seed)
    order = in_buckets(torch.randperm(len(lengths), generator=generator), table, size, generator)
    assert order.sort().values.tolist() == list(range(len(lengths)))
    # Sorted among themselves, the pieces' ranges of lengths touch but do not overlap.
    ranges = sorted((int(part.min()), int(part.max())) for part in table[order].split(size))
    assert all(before[1] <= after[0] for before, after in pairwise(ranges))


def test_batches_come_in_random_order_and_hold_other_samples_every_epoch(root: str, tokenizer: str) -> None:
    cola(Path(root), train=400)
    data = with_model(small(root), tokenizer)
    data.setup("fit")
    one, two = epochs(data, 0, 2)[:50], epochs(data, 0, 2)[50:]
    for epoch in (one, two):
        lengths = [int(data.train_set.padded_lengths[batch].max()) for batch in epoch]
        assert set(lengths) == {8, 16, 24}
        assert sorted(lengths) != lengths
        rank = torch.tensor(lengths).double()
        assert abs(torch.corrcoef(torch.stack([rank, torch.arange(50.0).double()]))[0, 1]) < 0.4
    assert not {frozenset(batch) for batch in one} & {frozenset(batch) for batch in two}


def test_the_short_batch_is_of_any_length(root: str, tokenizer: str) -> None:
    data = with_model(small(root), tokenizer)
    data.setup("fit")
    batches = epochs(data, 0, 30)
    assert [len(batch) for batch in batches] == [8, 8, 8, 8, 8, 8, 2] * 30
    assert {int(data.train_set.padded_lengths[batch].max()) for batch in batches[6::7]} == {8, 16, 24}


@pytest.mark.parametrize("padded", [False, True])
def test_any_position_resumes(padded: bool, root: str, tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = with_model(small(root, pad_to_max_length=padded), tokenizer)
    data.setup("fit")
    whole = epochs(data, 0, 3)
    assert len(whole) == 21
    for epoch in range(3):
        assert sorted(i for batch in whole[7 * epoch : 7 * epoch + 7] for i in batch) == list(range(50))
    torch.manual_seed(5)
    for position in (1, 6, 7, 10, 20):
        assert epochs(data, position, 3) == whole[position:]
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    assert epochs(data, 0, 3) != whole


def test_devices_share_the_lengths_of_a_step(root: str, tokenizer: str) -> None:
    alone = with_model(small(root), tokenizer)
    ranks = [with_model(small(root, batch_size=4), tokenizer, global_rank=rank, world_size=2) for rank in (0, 1)]
    for data in (alone, *ranks):
        data.setup("fit")
    together = [sorted(a + b) for a, b in zip(*(epochs(data, 0, 1) for data in ranks), strict=True)]
    assert together == [sorted(batch) for batch in epochs(alone, 0, 1)]


# -- batches


def test_a_batch_is_padded_to_its_longest_rounded_up(root: str, tokenizer: str) -> None:
    data = with_model(small(root), tokenizer)
    data.setup("fit")
    seen = set()
    for loader in (data.train_dataloader(), data.val_dataloader()):
        for batch in loader:
            longest = int(batch["attention_mask"].sum(1).max())
            assert batch["input_ids"].shape == batch["token_type_ids"].shape
            assert batch["input_ids"].shape[1] == min(-(-longest // 8) * 8, 24)
            assert torch.equal(batch["input_ids"] != WORDS.index("[PAD]"), batch["attention_mask"].bool())
            assert batch["label"].tolist() == [i % 2 for i in batch["index"].tolist()]
            seen.add(batch["input_ids"].shape[1])
    assert seen == {8, 16, 24}


def test_rounding_does_not_pass_the_maximum(root: str, tokenizer: str) -> None:
    data = with_model(small(root, max_length=21), tokenizer)
    data.setup("fit")
    assert {batch["input_ids"].shape[1] for batch in data.train_dataloader()} == {8, 16, 21}


def test_a_trial_pads_the_shortest_text_to_the_longest(root: str, tokenizer: str) -> None:
    data = with_model(small(root), tokenizer)
    data.setup("fit")
    lengths = data.train_set.tokens.lengths
    seen = data.trial_batch()["attention_mask"].sum(1)
    assert sorted(seen.tolist()) == [int(lengths.min()), int(lengths.max())]
    assert lengths.min() < lengths.max()


def test_padding_to_the_maximum(root: str, tokenizer: str) -> None:
    data = with_model(small(root, pad_to_max_length=True), tokenizer)
    data.setup("fit")
    for loader in (data.train_dataloader(), data.val_dataloader()):
        assert {batch["input_ids"].shape[1] for batch in loader} == {24}
    # The literal setting: batches drawn without regard to length.
    assert torch.equal(data.train_order(1), super(GLUEData.__mro__[1], data).train_order(1))


def test_evaluation_hands_out_everything_once_longest_first(root: str, tokenizer: str) -> None:
    data = with_model(small(root), tokenizer)
    data.setup("fit")
    batches = list(data.val_dataloader())
    lengths = [length for batch in batches for length in batch["attention_mask"].sum(1).tolist()]
    assert lengths == sorted(lengths, reverse=True)
    assert sorted(i for batch in batches for i in batch["index"].tolist()) == list(range(11))


def test_workers_give_the_same(root: str, tokenizer: str) -> None:
    seen = []
    for workers in (0, 2):
        data = with_model(small(root, num_workers=workers), tokenizer)
        data.setup("fit")
        seen.append(epochs(data, 0, 1))
    assert seen[0] == seen[1]


@pytest.mark.parametrize("config", [BERT, DEBERTA], ids=["bert", "deberta"])
def test_bucketed_and_padded_logits_are_equal(config: dict[str, Any], root: str, tokenizer: str) -> None:
    torch.manual_seed(0)
    # Weights large enough that every token counts.
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(**config, initializer_range=0.5)).eval()
    logits: list[Tensor] = []
    for padded in (False, True):
        data = with_model(small(root, pad_to_max_length=padded), tokenizer)
        data.setup("fit")
        rows = torch.zeros(50, 2)
        for batch in data.train_dataloader():
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
            rows[batch["index"]] = model(**inputs).logits.detach()
        logits.append(rows)
    assert logits[0].std(0).min() > 0.1
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)


# -- splits


def test_without_a_fraction_dev_is_both(root: str, tokenizer: str) -> None:
    data = with_model(small(root), tokenizer)
    data.setup("fit")
    data.setup("test")
    assert data.has_test_labels
    assert (len(data.train_set), len(data.val_set), len(data.test_set)) == (50, 11, 11)


def test_a_fraction_is_held_out_of_train_and_leaves_dev_for_the_test(root: str, tokenizer: str) -> None:
    sets = []
    for seed in (0, 0, 1):
        data = with_model(small(root, val_fraction=0.2, seed=seed), tokenizer)
        data.setup("fit")
        data.setup("test")
        assert (len(data.train_set), len(data.val_set), len(data.test_set)) == (40, 10, 11)
        assert sorted(data.train_set.rows.tolist() + data.val_set.rows.tolist()) == list(range(50))
        labels = [label for batch in data.val_dataloader() for label in batch["label"].tolist()]
        assert sorted(labels) == [0] * 5 + [1] * 5
        for batch in data.val_dataloader():
            # The label of sentence i is i % 2, its first word the (i % 20)th.
            rows = data.val_set.rows[batch["index"]]
            assert torch.equal(batch["label"], rows % 2)
            assert torch.equal(batch["input_ids"][:, 1], rows % 20 + W0)
        index = [i for batch in data.val_dataloader() for i in batch["index"].tolist()]
        assert sorted(index) == list(range(10))
        sets.append(data.val_set.rows.tolist())
    assert sets[0] == sets[1] != sets[2]


def test_predict_takes_the_hidden_split(root: str, tokenizer: str) -> None:
    data = with_model(small(root), tokenizer)
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    assert "label" not in batch
    assert sorted(batch["index"].tolist()) == list(range(7))
    assert data.sample_name(3) == "3"


def test_validate_reads_dev_alone(root: str, tokenizer: str) -> None:
    (Path(root) / "CoLA" / "train.tsv").unlink()
    data = with_model(small(root), tokenizer)
    data.setup("validate")
    assert len(data.val_set) == 11


def test_a_test_that_cannot_be_read_is_told_before_the_training(root: str, tokenizer: str) -> None:
    (Path(root) / "CoLA" / "dev.tsv").unlink()
    data = with_model(small(root, val_fraction=0.2), tokenizer)
    with pytest.raises(UserError, match=mentions("dev.tsv'", "exist")):
        data.setup("fit")


def test_more_tokens_than_the_model_has_positions_for(root: str, tokenizer: str) -> None:
    data = with_model(small(root, max_length=24), tokenizer)
    data.trainer.lightning_module.max_tokens = 23
    with pytest.raises(UserError, match=mentions("data.max_length", "24", "23")):
        data.setup("fit")
    data.trainer.lightning_module.max_tokens = 24
    data.setup("fit")


def test_cut_texts_are_counted_and_said_once(root: str, tokenizer: str, caplog: pytest.LogCaptureFixture) -> None:
    data = with_model(small(root, max_length=24), tokenizer)
    with caplog.at_level("INFO"):
        data.setup("fit")
        data.setup("test")
        data.setup("fit")
    said = [record.getMessage() for record in caplog.records if "cut" in record.getMessage()]
    words = [1 + 7 * i % 30 for i in range(50)]
    assert said == [
        f"{sum(count > 22 for count in words)} of the 50 samples in 'train' are longer than data.max_length 24 tokens "
        "and were cut.",
        f"{sum(count > 22 for count in words[:11])} of the 11 samples in 'dev' are longer than data.max_length 24 "
        "tokens and were cut.",
    ]


def test_validation_held_out_of_train_counts_the_cut_texts_of_train(
    root: str, tokenizer: str, caplog: pytest.LogCaptureFixture
) -> None:
    data = with_model(small(root, max_length=24, val_fraction=0.2), tokenizer)
    with caplog.at_level("INFO"):
        data.setup("validate")
    (said,) = [record.getMessage() for record in caplog.records if "cut" in record.getMessage()]
    assert "of the 50 samples in 'train'" in said


def test_another_model_has_its_own_tokenizer(root: str, tokenizer: str, tmp_path: Path) -> None:
    data = with_model(small(root), tokenizer)
    data.setup("fit")
    assert "token_type_ids" in next(iter(data.train_dataloader()))
    with_model(data, save_tokenizer(tmp_path / "other", names=("input_ids", "attention_mask")))
    data.setup("fit")
    assert "token_type_ids" not in next(iter(data.train_dataloader()))


# -- errors


def test_a_fraction_of_nothing(root: str, tokenizer: str) -> None:
    with pytest.raises(UserError, match=mentions("data.val_fraction", "0.001", "50")):
        with_model(small(root, val_fraction=0.001), tokenizer).setup("fit")


def test_a_model_without_a_tokenizer(root: str) -> None:
    data = with_model(small(root), "")
    del data.trainer.lightning_module.backbone_name
    with pytest.raises(UserError, match=mentions("GLUEData", "backbone_name")):
        data.setup("fit")


def test_a_length_of_nothing(root: str) -> None:
    with pytest.raises(UserError, match=mentions("data.max_length", "0")):
        small(root, max_length=0)


# -- with Lightning


class Recorder(ExactResume, L.LightningModule):
    """Trains a bag of words and keeps the (indices, tokens) of every training batch."""

    num_classes = 2

    def __init__(self, tokenizer: str) -> None:
        super().__init__()
        self.backbone_name = tokenizer
        self.words = nn.EmbeddingBag(len(WORDS), 2)
        self.seen: list[tuple[list[int], list[list[int]]]] = []

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        self.seen.append((batch["index"].tolist(), batch["input_ids"].tolist()))
        return nn.functional.cross_entropy(self.words(batch["input_ids"]), batch["label"])

    def validation_step(self, batch: dict[str, Tensor], _: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # Asking for the steps makes Lightning build the training iterator before it restores its counters.
        assert self.trainer.estimated_stepping_batches > 0
        return torch.optim.SGD(self.parameters(), lr=0.01)


def run(model: Any, data: GLUEData, steps: int, path: Path, resume: Path | None = None) -> Any:
    trainer = L.Trainer(
        max_steps=steps,
        max_epochs=20,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data, ckpt_path=resume)
    trainer.save_checkpoint(path)
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stop", [3, 7, 11])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_sees_the_same(stop: int, workers: int, root: str, tokenizer: str, tmp_path: Path) -> None:
    def go(steps: int, name: str, workers: int = 0, resume: Path | None = None) -> Recorder:
        L.seed_everything(3, verbose=False)
        data = small(root, num_workers=workers, val_fraction=0.1)
        return run(Recorder(tokenizer), data, steps, tmp_path / name, resume)

    whole = go(16, "whole.ckpt")
    go(stop, "part.ckpt", workers)
    rest = go(16, "rest.ckpt", workers, tmp_path / "part.ckpt")
    assert rest.seen == whole.seen[stop:]
    assert torch.equal(rest.words.weight, whole.words.weight)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"max_length": 16}, ["data.max_length", "24", "16"]),
        ({"pad_to_max_length": True}, ["data.pad_to_max_length", "False", "True"]),
    ],
)
def test_another_order_is_refused(
    change: dict[str, Any], named: str, root: str, tokenizer: str, tmp_path: Path
) -> None:
    run(Recorder(tokenizer), small(root), 3, tmp_path / "part.ckpt")
    with pytest.raises(UserError, match=mentions(*named)):
        run(Recorder(tokenizer), small(root, **change), 6, tmp_path / "rest.ckpt", tmp_path / "part.ckpt")


@pytest.mark.filterwarnings("ignore")
def test_the_text_task_on_these_data(root: str, tmp_path: Path) -> None:
    """Fit, resumed in the middle of an epoch, equals the uninterrupted run to the bit, dropout and all."""
    backbone = folder(tmp_path / "bert", BERT)
    save_tokenizer(tmp_path / "bert")

    def go(steps: int, name: str, resume: Path | None = None) -> TextClassifier:
        L.seed_everything(3, verbose=False)
        kwargs = {"pretrained": False}
        model = TextClassifier(backbone, 2, LoRA(rank=2), kwargs, lr=0.01, schedule="constant")
        return run(model, small(root), steps, tmp_path / name, resume)

    whole = go(11, "whole.ckpt")
    assert {"val/matthews", "val/loss", "val/score"} <= set(whole.trainer.callback_metrics)
    go(4, "part.ckpt")
    rest = go(11, "rest.ckpt", tmp_path / "part.ckpt")
    for (name, value), other in zip(whole.state_dict().items(), rest.state_dict().values(), strict=True):
        assert torch.equal(value, other), name
