"""A run planned for N steps, stopped anywhere and resumed, equals the uninterrupted one bit for bit."""

import random
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, LearningRateFinder, ModelCheckpoint, Timer
from lightning.pytorch.loggers import CSVLogger

from srlora_pl import ImageClassifier, PiSSA, UserError
from tests.helpers.digits import BACKBONE, SHAPE, STEPS, SmallDigits, assert_equal, final, model, trainer
from tests.helpers.errors import mentions

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("backbone")]

# 60 images for training in batches of 8: 8 micro-batches an epoch, the last of 4 images


class Interrupted(Exception):  # noqa: N818
    pass


class InterruptAt(Callback):
    """As abrupt as it gets inside one process: an exception between two micro-batches, or inside validation."""

    def __init__(self, batch=None, validation=None):
        self.batch, self.validation, self.validations = batch, validation, 0

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.fit_loop.epoch_loop.batch_progress.total.processed == self.batch:
            raise Interrupted

    def on_validation_batch_start(self, trainer, *args):
        self.validations += not trainer.sanity_checking
        if self.validations == self.validation:
            raise Interrupted


def fit(folder, *callbacks, data=None, ckpt_path=None, module=None, **options):
    L.seed_everything(3, verbose=False)
    module = module or model()
    run = trainer(folder, *callbacks, **options)
    run.fit(module, datamodule=SmallDigits(**(data or {})), ckpt_path=ckpt_path)
    return module


CASES = {
    "plain": {},
    "accumulate": {"accumulate_grad_batches": 2},
    "accumulate 3 over a short epoch": {"accumulate_grad_batches": 3, "limit_train_batches": 7},
    "epochs": {"max_steps": -1, "max_epochs": 3, "limit_train_batches": 5},
    "epochs, validation at their end": {
        "max_steps": -1,
        "max_epochs": 2,
        "val_check_interval": None,
        "check_val_every_n_epoch": 1,
    },
}


SLOW = ["accumulate", "accumulate 3 over a short epoch", "epochs, validation at their end"]


@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.slow if case in SLOW else ()) for case in CASES])
def test_interrupted_anywhere_and_resumed(case, tmp_path):
    options = CASES[case]
    expected = fit(tmp_path / "whole", **options)
    assert expected.adaptation.controller.progress().done == 3
    total = expected.trainer.fit_loop.epoch_loop.batch_progress.total.processed
    for stop in range(4, total, 2):  # after the first file, which waits for the first optimizer step
        folder = tmp_path / f"stop{stop}"
        with pytest.raises(Interrupted):
            fit(folder, InterruptAt(batch=stop), **options)
        assert_equal(fit(folder, ckpt_path=folder / "last.ckpt", **options), expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_interrupted_twice_with_workers_and_in_validation(workers, tmp_path):
    data = {"num_workers": workers}
    expected = fit(tmp_path / "whole", data=data)
    folder = tmp_path / "stopped"
    with pytest.raises(Interrupted):
        fit(folder, InterruptAt(validation=2), data=data)
    with pytest.raises(Interrupted):
        fit(folder, InterruptAt(batch=10), data=data, ckpt_path=folder / "last.ckpt")
    with pytest.raises(Interrupted):
        fit(folder, InterruptAt(batch=11), data=data, ckpt_path=folder / "last.ckpt")
    assert_equal(fit(folder, data=data, ckpt_path=folder / "last.ckpt"), expected)


class SaveElsewhere(Callback):
    """Files from hooks other than the end of a batch, named by hook and position."""

    def save(self, run, hook):
        if not run.sanity_checking:
            position = run.fit_loop.epoch_loop.batch_progress.total.processed
            run.save_checkpoint(Path(run.default_root_dir, f"{hook}-{position}.ckpt"))

    def on_validation_start(self, run, module):
        self.save(run, "validation_start")

    def on_validation_end(self, run, module):
        self.save(run, "validation_end")

    def on_train_epoch_end(self, run, module):
        self.save(run, "epoch_end")


@pytest.mark.parametrize("case", ["plain", "epochs", "epochs, validation at their end"])
def test_resume_from_files_written_around_validation_and_at_epoch_ends(case, tmp_path):
    options = CASES[case]
    expected = fit(tmp_path, SaveElsewhere(), **options)
    files = sorted(tmp_path.glob("*_*-*.ckpt"))
    assert len(files) >= 4
    for file in files:
        resumed = fit(tmp_path / "resumed" / file.stem, ckpt_path=file, **options)
        assert_equal(resumed, expected)
        assert resumed.trainer.global_step == expected.trainer.global_step


def test_whole_checkpoints_give_the_same_run(tmp_path):
    expected = fit(tmp_path / "whole")
    with pytest.raises(Interrupted):
        fit(tmp_path, InterruptAt(batch=9), module=model(checkpoints="full"))
    assert set(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]) == set(expected.state_dict())
    assert_equal(fit(tmp_path, module=model(checkpoints="full"), ckpt_path=tmp_path / "last.ckpt"), expected)
    assert_equal(fit(tmp_path, ckpt_path=tmp_path / "last.ckpt"), expected)  # the option is free to change


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_a_checkpoint_holds_what_changed_and_serves_test_as_the_run_itself(precision, tmp_path):
    module = fit(tmp_path, precision=precision)
    assert module.adaptation.controller.progress().done == 3
    file = tmp_path / "last.ckpt"
    names = set(torch.load(file, weights_only=True)["state_dict"])
    assert names == {name for name, p in module.named_parameters() if p.requires_grad}
    options = {"precision": precision, "enable_checkpointing": False}
    (score,) = L.Trainer(**options, accelerator="cpu", logger=False).test(module, SmallDigits(), verbose=False)
    for other in (model(), module, ImageClassifier.load_from_checkpoint(file)):
        run = L.Trainer(**options, accelerator="cpu", logger=False)
        path = file if other is module or not other.adaptation.controller.progress().done else None
        (again,) = run.test(other, SmallDigits(), ckpt_path=path, verbose=False, weights_only=True)
        # load_from_checkpoint knows of no precision: it rounds doubles to the module's own fp32
        assert again == (score if path else pytest.approx(score, abs=1e-8))


def test_an_earlier_file_of_the_same_run_serves_in_the_same_process(tmp_path):
    """As when training ends and the best checkpoint is tested: the pretrained weights are read once more."""
    module = fit(tmp_path)
    earlier = tmp_path / "step=6.ckpt"
    run = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    fresh = model()
    run.test(fresh, SmallDigits(), ckpt_path=earlier, verbose=False, weights_only=True)
    run.test(module, SmallDigits(), ckpt_path=earlier, verbose=False, weights_only=True)
    assert 0 < fresh.adaptation.controller.progress().done < 3
    assert_equal(module, fresh)


def test_number_of_workers_changes_nothing(tmp_path):
    assert_equal(fit(tmp_path / "a", data={"num_workers": 2}), fit(tmp_path / "b", data={"num_workers": 0}))


def test_a_stop_in_the_middle_of_an_accumulation_keeps_the_gradients(tmp_path):
    """Validation may fall between the micro-batches of a step, and write a file there."""
    options = {"accumulate_grad_batches": 4, "val_check_interval": 5, "max_steps": 6}

    class SaveAfterValidation(Callback):
        def on_validation_end(self, run, module):
            if not run.sanity_checking:
                run.save_checkpoint(tmp_path / f"{run.fit_loop.epoch_loop.batch_progress.total.processed}.ckpt")

    expected = fit(tmp_path / "whole", SaveAfterValidation(), **options)
    saved = torch.load(tmp_path / "5.ckpt", weights_only=True)["exact_resume"]
    assert saved["processed"] == 5
    assert saved["gradients"]
    assert_equal(fit(tmp_path / "resumed", ckpt_path=tmp_path / "5.ckpt", **options), expected)


def test_the_steps_that_loggers_see_continue(tmp_path):
    class Steps(Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_end(self, run, module, outputs, batch, batch_idx):
            self.seen.append((run.fit_loop.epoch_loop._batches_that_stepped, run.current_epoch, batch_idx))

    whole, first, second = Steps(), Steps(), Steps()
    fit(tmp_path / "whole", whole)
    with pytest.raises(Interrupted):
        fit(tmp_path / "a", first, InterruptAt(batch=9))
    fit(tmp_path / "a", second, ckpt_path=tmp_path / "a" / "last.ckpt")
    assert first.seen + second.seen == whole.seen
    assert [step for step, _, _ in whole.seen] == list(range(STEPS))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"accumulate_grad_batches": 2}, ["trainer.accumulate_grad_batches", "2", "1"]),
        ({"data": {"batch_size": 6}}, ["batch_size"]),
    ],
)
def test_a_resume_that_cannot_be_exact_is_refused(change, words, tmp_path):
    with pytest.raises(Interrupted):
        fit(tmp_path, InterruptAt(batch=3))
    with pytest.raises(UserError, match=mentions(*words)):
        fit(tmp_path, ckpt_path=tmp_path / "last.ckpt", **change)


def test_another_seed_is_refused(tmp_path):
    with pytest.raises(Interrupted):
        fit(tmp_path, InterruptAt(batch=3))
    L.seed_everything(4, verbose=False)
    with pytest.raises(UserError, match="seed"):
        trainer(tmp_path).fit(model(), datamodule=SmallDigits(), ckpt_path=tmp_path / "last.ckpt")


def test_every_micro_batch_draws_numbers_of_its_own(tmp_path):
    class Draws(Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_end(self, *args):
            self.seen.append((torch.rand(()).item(), np.random.rand(), random.random()))

    draws = Draws()
    fit(tmp_path, draws, accumulate_grad_batches=2, max_steps=7)
    assert [len(set(each)) for each in zip(*draws.seen, strict=True)] == [14, 14, 14]


def test_the_seed_matters(tmp_path):
    """Sanity of the tests above: other randomness gives another result."""
    one = fit(tmp_path / "a")
    L.seed_everything(4, verbose=False)
    other = model()
    trainer(tmp_path / "b").fit(other, datamodule=SmallDigits())
    assert not torch.equal(final(one)["smoothed"], final(other)["smoothed"])


# --- the end of a run ------------------------------------------------------------------------------------------------


class Validations(Callback):
    """After which optimizer steps, and in which epochs, the run validated; ModelCheckpoint saves after this hook."""

    def __init__(self):
        self.seen = []

    def on_validation_end(self, run, module):
        if not run.sanity_checking:
            self.seen.append((run.global_step, run.current_epoch))


class Stop(Callback):
    def __init__(self, hook, step):
        self.step = step
        setattr(self, hook, self.stop)

    def stop(self, run, *args):
        run.should_stop = run.should_stop or run.global_step >= self.step


EPOCHS = {"max_steps": -1, "max_epochs": 2, "val_check_interval": None}
ENDS = {
    "interval longer than the run": ({"val_check_interval": 100}, [(14, 1)]),
    "last interval not full": ({"val_check_interval": 9}, [(9, 1), (14, 1)]),
    "interval that ends with the run": ({"val_check_interval": 7}, [(7, 0), (14, 1)]),
    "epoch not full": ({"val_check_interval": None, "check_val_every_n_epoch": 1}, [(8, 0), (14, 1)]),
    "part of an epoch": ({"val_check_interval": 0.8, "check_val_every_n_epoch": 1}, [(6, 0), (14, 1)]),
    "more epochs than the run has": ({**EPOCHS, "check_val_every_n_epoch": 5}, [(16, 1)]),
    "every epoch": ({**EPOCHS, "check_val_every_n_epoch": 1}, [(8, 0), (16, 1)]),
    "accumulation": ({"accumulate_grad_batches": 3, "max_steps": 4, "val_check_interval": 100}, [(4, 1)]),
    "time interval": ({"val_check_interval": "00:01:00:00"}, [(14, 1)]),
    "none": ({"limit_val_batches": 0}, []),
}


@pytest.mark.parametrize("case", ENDS)
def test_a_run_ends_with_one_validation(case, tmp_path):
    options, expected = ENDS[case]
    validations = Validations()
    best = ModelCheckpoint(tmp_path / "best", monitor="val/loss")
    module = fit(tmp_path, validations, best, **options)
    assert validations.seen == expected
    assert (best.best_model_score is not None) == bool(expected)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == module.global_step


SPARSE = {"val_check_interval": None, "check_val_every_n_epoch": 9}


@pytest.mark.parametrize(
    ("stops", "options", "expected"),
    [
        (lambda: Stop("on_train_batch_end", 3), SPARSE, (3, 0)),
        (lambda: Stop("on_train_batch_end", 3), {**SPARSE, "min_epochs": 1}, (8, 0)),
        (lambda: Stop("on_train_batch_end", 3), {**SPARSE, "min_steps": 11}, (11, 1)),
        (lambda: Stop("on_train_epoch_end", 1), SPARSE, (8, 0)),
        (lambda: Timer({"milliseconds": 1}), SPARSE, (1, 0)),
        (lambda: Timer({"milliseconds": 1}, interval="epoch"), SPARSE, (8, 0)),
        (lambda: EarlyStopping("train/loss", 9.0, patience=1, check_on_train_epoch_end=True), SPARSE, (16, 1)),
        (lambda: EarlyStopping("val/loss", patience=1, min_delta=9.0), {"val_check_interval": 3}, (6, 0)),
    ],
    ids=["a callback", "least epochs", "least steps", "at an epoch's end", "time", "time and epoch", "loss", "score"],
)
def test_a_run_that_is_stopped_ends_with_one_validation(stops, options, expected, tmp_path):
    validations = Validations()
    module = fit(tmp_path, validations, stops(), log_every_n_steps=1, max_steps=40, **options)
    assert validations.seen[-1] == expected
    assert module.global_step == expected[0]
    assert len(dict(validations.seen)) == len(validations.seen)


def test_the_end_of_a_shorter_run_leaves_nothing_to_the_run_that_goes_on(tmp_path):
    """Not even in the patience of EarlyStopping, which the validation after step 6 is nothing to."""

    def half_way(name, **options):
        stopping = EarlyStopping("val/loss", patience=3, min_delta=9.0)
        module = model(method=PiSSA(rank=2), schedule="constant")
        fit(tmp_path / name, stopping, module=module, val_check_interval=4, **options)
        return module, stopping

    expected, whole = half_way("whole")
    assert (expected.global_step, whole.wait_count) == (14, 2)
    _, first = half_way("parts", max_steps=6)
    assert first.wait_count == 0
    resumed, second = half_way("parts", ckpt_path=tmp_path / "parts/last.ckpt")
    assert_equal(resumed, expected)
    assert second.state_dict() == whole.state_dict()


@pytest.mark.parametrize("file", ["validation_end-14", "epoch_end-14"])
def test_a_finished_run_that_is_resumed_does_not_validate_again(file, tmp_path):
    validations = Validations()
    expected = fit(tmp_path, SaveElsewhere(), val_check_interval=100)
    resumed = fit(tmp_path, validations, val_check_interval=100, ckpt_path=tmp_path / f"{file}.ckpt")
    assert_equal(resumed, expected)
    assert validations.seen == []


@pytest.mark.parametrize("case", ["interval longer than the run", "more epochs than the run has", "epoch not full"])
def test_the_validation_at_the_end_is_made_up(case, tmp_path):
    options, expected = ENDS[case]
    whole = fit(tmp_path / "whole", **options)
    with pytest.raises(Interrupted):
        fit(tmp_path, InterruptAt(validation=1 + 3 * len(expected[1:])), **options)
    validations = Validations()
    assert_equal(fit(tmp_path, validations, ckpt_path=tmp_path / "last.ckpt", **options), whole)
    assert validations.seen == expected[-1:]


def test_a_trainer_is_left_to_other_modules_as_it_was(tmp_path):
    run = trainer(tmp_path, max_steps=4)
    run.fit(model(), datamodule=SmallDigits())
    assert "_should_check_val_fx" not in vars(run.fit_loop.epoch_loop)


def test_the_trial_of_a_tuner_ends_without_validation(tmp_path):
    class Watched(ImageClassifier):
        def on_validation_start(self):
            super().on_validation_start()
            seen.append(self.trainer.global_step)

    seen = []
    torch.manual_seed(0)
    watched = Watched(backbone=BACKBONE["folder"], num_classes=10, method=PiSSA(rank=2), backbone_kwargs=SHAPE)
    finder = LearningRateFinder(num_training_steps=4)
    fit(tmp_path, finder, module=watched, val_check_interval=100, num_sanity_val_steps=0, logger=CSVLogger(tmp_path))
    assert seen == [14]
