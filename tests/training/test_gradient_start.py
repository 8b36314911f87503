"""Starts from gradients in a run of Lightning: from its own training data, once, and without moving anything else."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from srlora_pl import LoRAGA, LoRASB, UserError
from tests.helpers.data import attach
from tests.helpers.digits import SmallDigits, assert_equal, model, trainer
from tests.helpers.errors import mentions
from tests.helpers.toy_module import Toy, loader
from tests.helpers.toy_module import trainer as toy_trainer

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("backbone")]
METHODS = {"lora_sb": LoRASB(rank=2, gradient_samples=12), "lora_ga": LoRAGA(rank=2, gradient_samples=12)}


class Watch(Callback):
    """The images of each batch, as a sum, and the start by matrix."""

    def __init__(self) -> None:
        self.batches: list[float] = []
        self.started: dict[str, torch.Tensor] = {}

    def on_train_start(self, run, module):
        for matrix in module.adaptation.matrices:
            B, A = matrix.factors()
            self.started[matrix.name] = matrix.scaling * B @ A

    def on_train_batch_start(self, run, module, batch, batch_idx):
        self.batches.append(float(batch["image"].double().sum()))


def fit(folder, method, *callbacks, ckpt_path=None, **options):
    L.seed_everything(3, verbose=False)
    module = model(method=method, **options)
    trainer(folder, *callbacks, max_steps=6).fit(module, datamodule=SmallDigits(), ckpt_path=ckpt_path)
    return module


def test_it_starts_at_the_first_step_on_the_run_s_own_data(tmp_path):
    """That of AdamW at the rate of the first step that moves weights: the second one, of lr / warmup_steps."""
    still = {"drops": False, "mixup": 0.0, "cutmix": 0.0}
    watch, data = Watch(), attach(SmallDigits(), training=True)
    task = fit(tmp_path, LoRASB(rank=2, gradient_samples=12), watch, lr=0.03, **still)

    L.seed_everything(3, verbose=False)
    plain = model(method=LoRASB(rank=2), **still)
    net = plain.adaptation.merged_copy().requires_grad_(True)
    data.trainer.lightning_module.data_config = plain.data_config
    data.setup("fit")
    batches = list(data.sampled_batches(12))
    assert [len(batch["label"]) for batch in batches] == [8, 4]
    for batch in batches:
        batch = data.on_after_batch_transfer(batch, 0)
        nn.functional.cross_entropy(net(batch["image"]), batch["label"], reduction="sum").backward()
    for matrix in task.adaptation.matrices:
        G = matrix.of_weight(net.get_parameter(f"{matrix.layer_name}.weight").grad)
        U, sigma, Vh = torch.linalg.svd(-0.03 / 3 * G.sign(), full_matrices=False)
        best = (U[:, :2] * sigma[:2]) @ Vh[:2]
        # A gradient that is rounding noise has either sign.
        assert float((watch.started[matrix.name] - best).norm() / best.norm()) < 0.02, matrix.name


@pytest.mark.parametrize("name", METHODS)
def test_the_order_of_training_is_that_of_any_method(name, tmp_path):
    ours, others = Watch(), Watch()
    fit(tmp_path / "gradient", METHODS[name], ours)
    fit(tmp_path / "other", {"class_path": "srlora_pl.LoRA", "init_args": {"rank": 2}}, others)
    assert ours.batches == others.batches
    assert all(bool(update.any()) for update in ours.started.values())


@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_estimates_nothing_and_is_the_same(name, tmp_path, monkeypatch):
    expected = fit(tmp_path, METHODS[name])
    monkeypatch.setattr(SmallDigits, "sampled_batches", lambda self, samples: pytest.fail("estimated again"))
    for stop in (1, 4):
        resumed = fit(tmp_path / f"resumed{stop}", METHODS[name], ckpt_path=tmp_path / f"step={stop}.ckpt")
        assert_equal(resumed, expected)


def sampled(seed: int, **place: int) -> SmallDigits:
    L.seed_everything(seed, verbose=False)
    data = attach(SmallDigits(), **place)
    data.setup("fit")
    return data


def images(data: SmallDigits, samples: float) -> list[float]:
    """A number for each sampled image."""
    return [float(image.double().sum()) for batch in data.sampled_batches(samples) for image in batch["image"]]


def test_the_samples_are_a_stream_of_their_own():
    data = sampled(seed=5)
    state, order = torch.get_rng_state(), data.train_order(0)

    assert [len(images(data, samples)) for samples in (12, 0.5, 0.001, 1000)] == [12, 30, 2, 60]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(data.train_order(0), order)
    assert images(data, 12) == images(sampled(seed=5), 12)
    assert images(data, 12) == images(data, 30)[:12]
    assert images(data, 12) != images(sampled(seed=6), 12)


def test_processes_share_the_samples():
    shares = [images(sampled(seed=5, global_rank=rank, world_size=3), 10) for rank in range(3)]
    assert [len(share) for share in shares] == [4, 3, 3]
    assert sorted(image for share in shares for image in share) == sorted(images(sampled(seed=5), 10))


def test_a_module_that_gives_no_gradients_is_refused(tmp_path):
    with pytest.raises(UserError, match=mentions("LoRASB", "Toy", "gradients")):
        toy_trainer(tmp_path).fit(Toy(LoRASB(rank=2)), loader())
