"""A batch is tried before training: what cannot work ends the run at once, and all else never notices."""

import random

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from srlora_pl import ImageClassifier, ImageData, LoRA, TextClassifier
from srlora_pl.tasks import base
from srlora_pl.util.errors import UserError
from tests.helpers.encoders import BERT, ShuffledData, folder, samples
from tests.helpers.images import SMALL_VIT


def classifier(**options):
    torch.manual_seed(0)
    return ImageClassifier("vit_tiny_patch16_224", 10, LoRA(rank=2), SMALL_VIT, lr=0.01, **options)


def digits(batch_size=16):
    return ImageData("digits", batch_size=batch_size, val_fraction=0.1)


class Restless(nn.Module):
    """Notes that it was called: in a buffer, in another one that it replaces, and in every random stream."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("sizes", torch.zeros(0))
        self.modes = []

    def forward(self, x: Tensor) -> Tensor:
        self.modes.append((self.training, torch.is_grad_enabled()))
        self.calls += 1
        self.sizes = torch.cat([self.sizes, torch.tensor([float(len(x))])])
        return x + 0.01 * (torch.rand(()) + np.random.rand() + random.random())


class States(L.Callback):
    """The random states and the modes of all modules when training begins."""

    def on_train_start(self, trainer, module):
        self.seen = [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()]
        self.seen += [[each.training for each in module.modules()]]


def restless_run(trainer, monkeypatch, tried):
    if not tried:
        monkeypatch.setattr(base, "require_that_a_batch_passes", lambda task, data: None)
    L.seed_everything(3, verbose=False)
    model, states = classifier(), States()
    model.net.norm_pre = Restless()
    model.net.blocks[0].eval()  # a user may have reason to
    trainer(callbacks=[states], limit_val_batches=0).fit(model, datamodule=digits())
    assert model.net.norm_pre.modes[0] == ((False, False) if tried else (True, True))
    return states.seen, model.state_dict()


def test_a_run_is_the_same_to_the_bit_with_and_without_the_trial(trainer, monkeypatch):
    with monkeypatch.context() as patch:
        seen, state = restless_run(trainer, patch, tried=True)
    expected, without = restless_run(trainer, monkeypatch, tried=False)
    assert seen == expected
    for name, value in state.items():
        assert torch.equal(value, without[name]), name
    assert state["net.norm_pre.calls"] == len(state["net.norm_pre.sizes"]) == 6


def refusal(trainer, model, data):
    runs = trainer()
    with pytest.raises(UserError) as caught:
        runs.fit(model, datamodule=data)
    assert runs.global_step == 0
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_pictures_that_the_network_cannot_take(trainer):
    model = classifier()
    model.net.patch_embed.proj = nn.Conv2d(1, 32, 8, 8)
    message = refusal(trainer, model, digits())
    assert "'vit_tiny_patch16_224'" in message
    assert "to have 1 channels, but got 3" in message
    assert "image (2, 1, 8, 8) uint8" in message


def test_texts_that_the_network_cannot_take(trainer, tmp_path):
    """The longest text decides, wherever it stands."""
    model = TextClassifier(folder(tmp_path / "net", BERT), 2, LoRA(rank=2), {"pretrained": False})
    model.net.bert.embeddings.position_embeddings = nn.Embedding(8, 16)
    rows = samples(8, torch.arange(8) % 2, length=9)
    assert "input_ids (2, 9)" in refusal(trainer, model, ShuffledData(rows))


def test_a_loss_that_does_not_fit_the_labels(trainer, tmp_path):
    model = TextClassifier(folder(tmp_path / "net", BERT), 3, LoRA(rank=2), {"pretrained": False})
    rows = samples(8, torch.full((8,), 7))  # there is no class 7
    data = ShuffledData(rows)
    data.num_classes = 3
    assert "label (2,) int64" in refusal(trainer, model, data)


def test_a_loss_that_is_not_finite_from_the_start(trainer):
    model = classifier()
    nn.init.constant_(model.net.norm.weight, torch.nan)
    assert "nan before any training" in refusal(trainer, model, digits())


def test_a_single_sample_is_enough(trainer):
    data = digits(batch_size=1)
    data.load_all, data.load = data.load, lambda stage: data.load_all(stage) or keep_one(data)
    trainer(max_steps=1).fit(classifier(), datamodule=data)
    assert data.trial_batch()["image"].shape == (1, 1, 8, 8)


def keep_one(data):
    data.train_set.rows = data.train_set.rows[:1]


def test_nothing_is_compiled_for_the_trial(trainer, monkeypatch):
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    model = classifier()
    model.net.blocks[0].compile(backend=backend)
    with monkeypatch.context() as patch:
        patch.setattr(model, "on_train_start", lambda: pytest.fail("stop here"))
        with pytest.raises(pytest.fail.Exception):
            trainer(num_sanity_val_steps=0).fit(model, datamodule=digits())
    assert not compiled
