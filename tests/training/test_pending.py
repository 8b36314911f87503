"""A file written before or in a validation: the resumed run makes the validation up, and nothing of it twice."""

from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger

from srlora_pl.data.base import DataModule, KeyedDataset, split_keys
from srlora_pl.training.resume import ExactResume

pytestmark = pytest.mark.filterwarnings("ignore")


class Points(KeyedDataset):
    def __init__(self, size):
        self.x = torch.randn(size, 3, generator=torch.Generator().manual_seed(size))

    def __len__(self):
        return len(self.x)

    def __getitems__(self, keys):
        return {"x": self.x[split_keys(keys)[0]]}


class PointData(DataModule):
    """8 micro-batches an epoch, the last of half the size; 2 of validation."""

    num_classes, class_names = 2, ("a", "b")

    def __init__(self):
        super().__init__(batch_size=4, val_fraction=0, seed=0, num_workers=0)

    def load(self, stage):
        self.train_set, self.val_set = Points(30), Points(8)


class Tiny(ExactResume, L.LightningModule):
    """As little as a run needs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(3, 1)

    def loss(self, batch):
        return (self.layer(batch["x"]) - batch["x"].sum(1, keepdim=True)).square().mean()

    def training_step(self, batch, batch_idx):
        loss = self.loss({"x": torch.nn.functional.dropout(batch["x"])})
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss(batch))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.01)


class Rows(Logger):
    """Keeps what is logged."""

    name = version = "rows"

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append({"step": step, **metrics})

    def log_hyperparams(self, *args, **kwargs):
        pass

    def validations(self):
        return [row for row in self.rows if "val/loss" in row]


class SaveEverywhere(Checkpoint):
    """Files named by the validations logged before them, by hook and position; as ModelCheckpoint after all others."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def _save(self, hook):
        def save(run, *args, **kwargs):
            if not run.sanity_checking:
                done = len(run.logger.validations())
                position = run.fit_loop.epoch_loop.batch_progress.total.processed
                run.save_checkpoint(self.folder / f"{done}-{hook}-{position}.ckpt")

        return save

    def setup(self, run, module, stage):
        for hook in ("train_batch_start", "train_batch_end", "train_epoch_end", "train_end"):
            setattr(self, f"on_{hook}", self._save(hook))
        for hook in ("start", "batch_start", "batch_end", "epoch_end", "end"):
            setattr(self, f"on_validation_{hook}", self._save(f"validation_{hook}"))


def best(folder):
    """Keeps the two largest of a loss that falls: the first two, unless a validation is lost."""
    return ModelCheckpoint(
        folder, filename="{step}", monitor="val/loss", mode="max", save_top_k=2, enable_version_counter=False
    )


def fit(logger, *callbacks, ckpt_path=None, **options):
    L.seed_everything(3, verbose=False)
    defaults = {
        "max_steps": 14,
        "max_epochs": -1,
        "val_check_interval": 5,
        "check_val_every_n_epoch": None,
        "log_every_n_steps": 1,
        "use_distributed_sampler": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
    }
    module = Tiny()
    run = L.Trainer(**{**defaults, **options}, logger=logger, callbacks=list(callbacks))
    run.fit(module, datamodule=PointData(), ckpt_path=ckpt_path, weights_only=True)
    return module


BY_EPOCHS = {"val_check_interval": None, "check_val_every_n_epoch": 1}
CASES = {
    "plain": {},
    "the last step validates": {"max_steps": 15},
    "the last step ends an epoch": {"max_steps": 16, "val_check_interval": 4},
    "accumulate": {"accumulate_grad_batches": 2, "max_steps": 7},
    "accumulate 3, the last step cut short": {"accumulate_grad_batches": 3, "limit_train_batches": 7, "max_steps": 6},
    "epochs": {"max_steps": -1, "max_epochs": 2, **BY_EPOCHS},
    "every second epoch": {
        "max_steps": -1,
        "max_epochs": 4,
        "limit_train_batches": 5,
        **BY_EPOCHS,
        "check_val_every_n_epoch": 2,
    },
    "epochs, four validations in each": {"max_steps": -1, "max_epochs": 2, **BY_EPOCHS, "val_check_interval": 0.25},
    "epochs, stopped by steps inside one": {"max_steps": 20, "max_epochs": 3, **BY_EPOCHS},
    "stopped early": {"max_steps": 40},
    "epochs, stopped early": {"max_steps": -1, "max_epochs": 9, **BY_EPOCHS},
}


def callbacks(case, folder):
    stops = [EarlyStopping("val/loss", min_delta=9.0, patience=2)] if "early" in case else []
    return [best(folder), *stops]


SLOW = [
    "the last step ends an epoch",
    "epochs",
    "every second epoch",
    "epochs, four validations in each",
    "epochs, stopped early",
]


@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.slow if case in SLOW else ()) for case in CASES])
def test_no_validation_is_lost_or_done_twice(case, tmp_path):
    whole, (chooses, *stops) = Rows(), callbacks(case, tmp_path / "best")
    expected = fit(whole, *stops, SaveEverywhere(tmp_path / "files"), chooses, **CASES[case])
    files = sorted((tmp_path / "files").glob("*.ckpt"), key=lambda file: int(file.stem.rpartition("-")[2]))
    assert len(files) > 30
    assert len(whole.validations()) >= 2
    assert all(stop.stopped_epoch for stop in stops)
    wrong = []
    for file in files:
        rows, (again, *stops) = Rows(), callbacks(case, tmp_path / "best")
        resumed = fit(rows, again, *stops, ckpt_path=file, **CASES[case])
        if not torch.equal(resumed.layer.weight, expected.layer.weight):
            wrong.append(f"weights {file.stem}")
        if rows.validations() != whole.validations()[int(file.name.partition("-")[0]) :]:
            wrong.append(f"rows {file.stem} {rows.validations()} {whole.validations()}")
        # of two callbacks that save in one hook, the first one's file cannot know what the second does
        first = "train_epoch_end" if BY_EPOCHS.items() <= CASES[case].items() else "validation_end"
        if again.best_k_models != chooses.best_k_models and first not in file.stem:
            wrong.append(f"best {file.stem}")
        trainers = resumed.trainer, expected.trainer
        if len({(t.global_step, t.current_epoch) for t in trainers}) > 1:
            wrong.append(f"counters {file.stem} {[(t.global_step, t.current_epoch) for t in trainers]}")
    assert not wrong, wrong


def test_without_the_callback_that_stopped_it_a_run_goes_on(tmp_path):
    """Whether its file is of the validation that stopped it or of the end."""

    def stops():
        return EarlyStopping("val/loss", min_delta=9.0, patience=2)

    options = {"max_steps": 30, "enable_checkpointing": False}
    expected = fit(Rows(), **options)
    stopped = fit(Rows(), stops(), SaveEverywhere(tmp_path), max_steps=30)
    assert stopped.trainer.global_step == 15
    for name in ("3-train_end-15", "3-validation_end-15"):
        file = tmp_path / f"{name}.ckpt"
        assert torch.load(file, weights_only=True)["exact_resume"]["should_stop"]
        resumed = fit(Rows(), ckpt_path=file, **options)
        assert resumed.trainer.global_step == 30
        assert torch.equal(resumed.layer.weight, expected.layer.weight)
        assert fit(Rows(), stops(), ckpt_path=file, **options).trainer.global_step == 15
