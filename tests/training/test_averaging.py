"""Weights that Lightning's WeightAveraging averages: what is scored is what files hold, and a resume is exact."""

import itertools

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint, WeightAveraging

from srlora_pl.lowrank import LoRA, PiSSA
from srlora_pl.training.resume import ExactResume
from tests.helpers.toy_module import Toy, loader, trainer
from tests.helpers.toys import toy_net

pytestmark = pytest.mark.filterwarnings("ignore")


class Compact(ExactResume, Toy):
    """Files leave out what training does not change."""

    def __init__(self, method) -> None:
        super(Toy, self).__init__()
        self.net = toy_net()
        self.adapt(self.net, method, ["head"], pretrained=lambda: toy_net().state_dict())
        self.optimizer, self.lr, self.options = torch.optim.AdamW, 0.05, {}

    test_step = Toy.validation_step


def fit(folder, method, *callbacks, steps=12, ckpt_path=None):
    """The trainer and the module after a fit that validates every third step."""
    options = {"max_steps": steps, "val_check_interval": 3, "check_val_every_n_epoch": None}
    run = trainer(folder, callbacks=[*callbacks], enable_checkpointing=True, **options)
    module = Compact(method)
    run.fit(module, loader(12), loader(4), ckpt_path=ckpt_path)
    return run, module


def saver(folder, **options):
    return ModelCheckpoint(folder, monitor="val/loss", filename="best", enable_version_counter=False, **options)


def read(file):
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize(
    ("method", "averages"),
    [
        (LoRA(rank=2), lambda: EMAWeightAveraging(decay=0.5)),
        (LoRA(rank=2), WeightAveraging),
        (PiSSA(rank=2), lambda: EMAWeightAveraging(decay=0.5, use_buffers=False)),
        (PiSSA(rank=2), lambda: EMAWeightAveraging(decay=0.5, update_starting_at_step=1000)),  # the very first weights
    ],
)
def test_a_file_gives_the_score_that_it_was_chosen_by(method, averages, weights_only, tmp_path):
    files = saver(tmp_path, save_weights_only=weights_only)
    run, module = fit(tmp_path, method, averages(), files)
    best = float(files.best_model_score)
    # by the trainer of the fit, whose callback still has its own averages, and by one of its own
    for each, other in ((run, module), (trainer(tmp_path), Compact(method))):
        for score in (each.validate, each.test):
            (scores,) = score(other, loader(4), ckpt_path=files.best_model_path, verbose=False)
            assert scores["val/loss"] == pytest.approx(best, abs=1e-6)


def test_files_leave_out_what_is_not_trained_in_both_sets_of_weights(tmp_path):
    fit(tmp_path, LoRA(rank=2), EMAWeightAveraging(decay=0.5), saver(tmp_path))
    content = read(tmp_path / "best.ckpt")
    trained = {name for name, p in Compact(LoRA(rank=2)).named_parameters() if p.requires_grad}
    assert set(content["state_dict"]) == set(content["current_model_state"]) == trained


class SaveInside(Callback):
    """Saves in the middle of the second validation, as an interrupt does."""

    def __init__(self, path):
        self.path, self.starts = path, itertools.count()

    def on_validation_batch_start(self, trainer, *_):
        if not trainer.sanity_checking and next(self.starts) == 5:
            trainer.save_checkpoint(self.path)


def test_a_file_of_the_middle_of_a_validation_holds_each_where_it_belongs(tmp_path):
    every = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1)
    fit(tmp_path, LoRA(rank=2), EMAWeightAveraging(decay=0.5), SaveInside(tmp_path / "inside.ckpt"), every, steps=6)
    inside, after = read(tmp_path / "inside.ckpt"), read(tmp_path / "step=6.ckpt")
    for key in ("state_dict", "current_model_state"):
        assert all(torch.equal(value, after[key][name]) for name, value in inside[key].items())
    assert not torch.equal(inside["state_dict"]["net.head.weight"], inside["current_model_state"]["net.head.weight"])


class CutOff(Callback):
    def on_validation_batch_start(self, trainer, *_):
        if not trainer.sanity_checking:
            raise RuntimeError("cut off")


def test_a_validation_that_was_cut_off_leaves_nothing_to_the_next_fit(tmp_path):
    module = Compact(LoRA(rank=2))
    with pytest.raises(RuntimeError, match="cut off"):
        trainer(tmp_path, callbacks=[EMAWeightAveraging(decay=0.5), CutOff()], max_steps=2).fit(
            module, loader(12), loader(4)
        )
    every = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    run = trainer(tmp_path, callbacks=[EMAWeightAveraging(decay=0.5), every], enable_checkpointing=True, max_steps=3)
    run.fit(module, loader(12))
    for name, value in read(tmp_path / "step=3.ckpt")["state_dict"].items():
        assert torch.equal(module.state_dict()[name], value)  # the averages, which training ends with


def test_a_run_goes_on_without_the_callback_from_the_weights_that_it_trained(tmp_path):
    fit(tmp_path, LoRA(rank=2), EMAWeightAveraging(decay=0.5), ModelCheckpoint(tmp_path, filename="last"), steps=6)
    content = read(tmp_path / "last.ckpt")
    assert content["global_step"] == 6
    module = fit(tmp_path, LoRA(rank=2), ckpt_path=tmp_path / "last.ckpt", steps=6)[1]
    for name, value in content["current_model_state"].items():
        assert torch.equal(module.state_dict()[name], value)
