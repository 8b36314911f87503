"""The mixin under a real Trainer: when scores are taken, when switches fall, and what is refused."""

from functools import partial
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from srlora_pl import SRLoRAMixin, UserError
from srlora_pl.lowrank import Adaptation, GaLore, LinearProbe, LoRA, PiSSA
from tests.helpers.errors import mentions
from tests.helpers.toy_module import Toy, loader, srlora, trainer
from tests.helpers.toys import toy_batches, toy_net

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*is not resumable")


def test_a_module_that_adapts_nothing_is_told_so():
    class Forgetful(SRLoRAMixin, L.LightningModule):
        def training_step(self, batch, batch_idx): ...

        def configure_optimizers(self): ...

    with pytest.raises(UserError, match=mentions("Forgetful", "self.adapt", "__init__")):
        trainer(max_steps=1).fit(Forgetful(), loader())


def test_processes_are_sent_what_the_first_one_finds_from_its_cpu(monkeypatch) -> None:
    """From a GPU it would arrive on that same GPU, for whose memory all of them would then ask."""
    module, sent = Toy(LoRA(rank=2)), []
    strategy = SimpleNamespace(broadcast=lambda result: sent.append(result) or result)
    module._trainer = SimpleNamespace(world_size=2, is_global_zero=True, strategy=strategy)
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: tensor + 1)
    assert float(module.adaptation.run_on_rank_zero(lambda: torch.zeros(()))) == 1
    assert module.adaptation.run_on_rank_zero(lambda: 7) == 7
    assert len(sent) == 2


class Moves(Callback):
    """The optimizer steps after which a frozen weight had changed."""

    def __init__(self):
        self.steps, self._last = [], None

    def on_train_start(self, trainer, module):
        self._last = None

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        weight = module.adaptation.layers["blocks.0.fc1"].weight
        if self._last is not None and not torch.equal(weight, self._last):
            self.steps.append(trainer.global_step)
        self._last = weight.clone()


def assert_same(a, b):
    for (name, value), other in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


# --- the right gradient at the right time ----------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_trainer_equals_a_plain_loop(accumulate, clip):
    steps, batches = 20, toy_batches(40, dtype=torch.float64)
    module = Toy()
    trainer(
        max_steps=steps, precision="64-true", accumulate_grad_batches=accumulate, gradient_clip_val=clip, max_epochs=-1
    ).fit(module, loader(dtype=torch.float64))

    net = toy_net().double()
    adaptation = Adaptation(net, srlora())
    adaptation.start()
    adaptation.plan(steps)
    trainable = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.01)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        for x, y in batches[(step - 1) * accumulate : step * accumulate]:
            (nn.functional.cross_entropy(net(x), y) / accumulate).backward()
        adaptation.before_optimizer(step)
        if clip:
            nn.utils.clip_grad_norm_(trainable, clip)
        optimizer.step()
        adaptation.after_optimizer(step, optimizer)
    assert adaptation.controller.progress().done == module.adaptation.controller.progress().done == 3
    for mine, theirs in zip(module.net.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-13)
    mine, theirs = module.adaptation.controller.importance, adaptation.controller.importance
    torch.testing.assert_close(mine.smoothed, theirs.smoothed)


def test_64_true_starts_in_double():
    module = Toy(PiSSA(rank=4, alpha=8.0))
    x = toy_batches(1, dtype=torch.float64)[0][0]
    before = toy_net().double()(x)
    trainer(precision="64-true", max_steps=0).fit(module, loader(dtype=torch.float64))
    torch.testing.assert_close(module.net(x), before, rtol=0, atol=1e-12)


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_double_precision_is_refused_where_the_device_has_none(stage):
    module = Toy()
    module.trainer = trainer(precision="64-true")
    module.trainer.strategy._root_device = torch.device("mps", 0)
    with pytest.raises(UserError, match=mentions("trainer.precision", "'64-true'", "trainer.accelerator")):
        module.setup(stage)


class SkippedSteps(Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.before = module.adaptation.controller.importance.smoothed.clone()
        self.weight = module.adaptation.layers["blocks.0.fc1"].lora_A.detach().clone()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        stepped = not torch.equal(module.adaptation.layers["blocks.0.fc1"].lora_A, self.weight)
        observed = not torch.equal(module.adaptation.controller.importance.smoothed, self.before)
        self.history = [*getattr(self, "history", []), (stepped, observed)]


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_16_mixed_overflow_steps_leave_the_averages_alone(optimizer):
    """The real GradScaler on the CPU: its first scales overflow half precision and skip steps."""
    module, watch = Toy(optimizer=optimizer), SkippedSteps()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    trainer(plugins=[MixedPrecision("16-mixed", "cpu", scaler)], callbacks=[watch], max_steps=30).fit(module, loader())
    skipped = [not stepped for stepped, _ in watch.history]
    assert 2 <= sum(skipped) <= 20
    assert skipped[0]
    # a step that ends with a switch resets the averages; every other skipped step leaves them as they were
    switch_steps = {7, 15, 22}
    for step, (stepped, observed) in enumerate(watch.history, start=1):
        if step not in switch_steps:
            assert stepped == observed, step
    assert torch.isfinite(module.adaptation.controller.importance.smoothed).all()
    assert module.adaptation.controller.progress().done == 3


def test_fused_optimizers_under_a_scaler_give_the_scores_of_the_unscaled_gradient():
    def smoothed(**options):
        module = Toy(**options.pop("module", {}))
        trainer(max_steps=5, **options).fit(module, loader())
        return module.adaptation.controller.importance.smoothed

    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**8))
    fused = smoothed(module={"fused": True}, plugins=[plugin])
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**8))
    plain = smoothed(plugins=[plugin])
    assert plain.max() > 0
    torch.testing.assert_close(fused, plain, rtol=2e-2, atol=1e-7)


@pytest.mark.parametrize(
    "options",
    [
        {"max_steps": 40},
        {"max_steps": -1, "max_epochs": 1},
        {"max_steps": 40, "max_epochs": -1, "accumulate_grad_batches": 3},
        {"max_steps": 40, "val_check_interval": 5, "limit_val_batches": 2},
        {"max_steps": 40, "precision": "bf16-mixed"},
        {"max_steps": 40, "gradient_clip_val": 0.1},
    ],
)
def test_switches_fall_at_the_planned_optimizer_steps(options):
    module, moves = Toy(), Moves()
    trainer(callbacks=[moves], **options).fit(module, loader(), loader(2))
    assert moves.steps == [10, 20, 30]


def test_bf16_and_fp32_of_the_same_run_agree():
    losses = []
    for precision in ("32-true", "bf16-mixed"):
        module = Toy()
        trainer(precision=precision).fit(module, loader())
        losses.append(sum(nn.functional.cross_entropy(module.net(x), y) for x, y in toy_batches(10)) / 10)
    assert abs(losses[0] - losses[1]) < 0.02


# --- a model that already started ------------------------------------------------------------------------------------


def test_fit_twice_keeps_the_state_and_plans_over_its_own_steps():
    module, moves = Toy(srlora(rank=2)), Moves()
    trainer(callbacks=[moves, StopAt(6)], max_steps=20).fit(module, loader())
    assert moves.steps == [2, 4]  # and 6, after which no batch starts
    assert module.adaptation.controller.progress().done == 3
    before = {k: v.clone() for k, v in module.state_dict().items()}

    class Unchanged(Callback):
        def on_train_start(self, trainer, module):
            assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())

    trainer(callbacks=[moves, Unchanged()], max_steps=35).fit(module, loader())
    # 7 of 10 switches are left for 35 new steps, and the last of them would fall on their end
    assert moves.steps[2:] == [5, 10, 15, 20, 25, 30]
    assert module.adaptation.controller.progress().done == 9


def test_a_file_counts_its_own_step(tmp_path):
    """Lightning writes it before that step's end, where it switches."""
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=10, save_top_k=-1)
    trainer(tmp_path, max_steps=40, callbacks=[save], enable_checkpointing=True).fit(Toy(), loader())
    module = Toy.load_from_checkpoint(tmp_path / "step=20.ckpt")
    trainer(max_steps=8).fit(module, loader())
    assert module.adaptation.steps_before == 20


def test_a_longer_run_on_the_same_trainer_spreads_what_is_left(capsys):
    module = Toy()
    run = trainer(max_steps=20)
    run.fit(module, loader())
    assert module.adaptation.controller.progress().done == 3
    run.fit_loop.epoch_loop.max_steps = 40
    run.fit(module, loader())
    assert module.adaptation.controller.progress().done == 3
    assert {pace.schedule.first_step for pace in module.adaptation.controller.paces.values()} == {20}


def test_a_resumed_run_that_became_too_short_for_its_switches_is_refused(tmp_path):
    method = srlora(rank=2, target_rank=12)  # 10 switches
    first = trainer(tmp_path, callbacks=[StopAt(7)], max_steps=20)
    first.fit(Toy(method), loader())
    first.save_checkpoint(tmp_path / "a.ckpt")
    module = Toy(method)
    with pytest.raises(UserError, match=mentions("switches", "3 optimizer steps")):
        trainer(tmp_path, max_steps=10).fit(module, loader(), ckpt_path=tmp_path / "a.ckpt")
    trainer(tmp_path, max_steps=20).fit(module := Toy(method), loader(), ckpt_path=tmp_path / "a.ckpt")
    assert module.adaptation.controller.progress().done == 9


@pytest.mark.parametrize("method", [srlora(), PiSSA(rank=4), LoRA(rank=4)])
def test_learning_rate_finder_then_fit_equals_fit(method, tmp_path):
    expected, found = Toy(method), Toy(method)
    run = trainer(tmp_path)
    run.fit(expected, loader())
    finder = LearningRateFinder(num_training_steps=20, update_attr=False)
    trainer(tmp_path, callbacks=[finder]).fit(found, loader())
    assert finder.optimal_lr is not None
    assert found.adaptation.controller.progress().done == expected.adaptation.controller.progress().done
    assert_same(found, expected)


def test_a_tuners_trial_too_short_for_the_switches_is_no_error(tmp_path):
    module = Toy(srlora(rank=2, target_rank=12))
    finder = LearningRateFinder(num_training_steps=6, update_attr=False)
    trainer(tmp_path, callbacks=[finder]).fit(module, loader())
    assert module.adaptation.controller.progress().done == 9


@pytest.mark.parametrize("load", ["load_state", "validate"])
def test_load_then_fit_starts_from_the_loaded_values_and_the_right_spectrum(load, tmp_path):
    module = Toy()
    run = trainer(tmp_path, max_steps=20)
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    other = Toy()
    if load == "validate":
        trainer(tmp_path).validate(other, loader(2), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    else:
        checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
        other.on_load_checkpoint(checkpoint)
        other.load_state_dict(checkpoint["state_dict"])
    assert_same(other, module)
    trainer(tmp_path, max_steps=0).fit(other, loader())
    assert_same(other, module)
    for name, spectrum in module.adaptation.controller.spectra.items():
        assert torch.equal(other.adaptation.controller.spectra[name].U, spectrum.U)


# --- resume ----------------------------------------------------------------------------------------------------------


class StopAt(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop = trainer.global_step >= self.step


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("stop", [9, 10, 11, 30])
def test_resume_at_and_around_a_switch_step(stop, optimizer, tmp_path):
    """The file at a switch step is written before the switch: the resumed run makes it up."""
    expected = Toy(optimizer=optimizer)
    trainer(tmp_path).fit(expected, loader())
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    trainer(tmp_path, enable_checkpointing=True, callbacks=[keep, StopAt(stop)]).fit(Toy(optimizer=optimizer), loader())
    path = tmp_path / f"step={stop}.ckpt"
    saved = torch.load(path, weights_only=True)["srlora"]
    assert saved["controller"]["switches_done"] == (stop - 1) // 10

    # a plain loader starts anew, so hand it the rest; ExactResume has its own tests
    resumed = Toy(optimizer=optimizer)
    rest = DataLoader(toy_batches(40)[stop:] + toy_batches(40)[:stop], batch_size=None)
    trainer(tmp_path, max_epochs=-1).fit(resumed, rest, ckpt_path=path)
    assert resumed.adaptation.controller.progress().done == 3
    assert_same(resumed, expected)


def test_a_changed_length_replans_the_rest_and_says_so(tmp_path):
    run = trainer(tmp_path, max_steps=15)
    run.fit(Toy(srlora(rank=2)), loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    resumed, moves = Toy(srlora(rank=2)), Moves()
    # 9 of 10 switches done in 15 steps; the one left would fall on step 35 itself
    with pytest.warns(UserWarning, match=mentions("step 35", "0 switches")):
        trainer(tmp_path, max_epochs=-1, max_steps=35, callbacks=[moves]).fit(
            resumed, loader(), ckpt_path=tmp_path / "a.ckpt"
        )
    assert moves.steps == []


# --- what is said and refused ----------------------------------------------------------------------------------------


def test_early_stopping_says_how_many_switches_were_not_reached(caplog):
    with caplog.at_level("INFO"):
        trainer(callbacks=[StopAt(15)]).fit(Toy(), loader())
    assert "stopped at step 15: 2 of 3 switches were not reached" in caplog.text
    caplog.clear()
    with caplog.at_level("INFO"):
        trainer().fit(Toy(), loader())
    assert "not reached" not in caplog.text


class OwnLoader(Toy):
    """Makes its data in its own setup, after the mixin's."""

    def setup(self, stage):
        super().setup(stage)
        self.batches = toy_batches(9)

    def train_dataloader(self):
        return DataLoader(self.batches, batch_size=None)


@pytest.mark.parametrize("options", [{"max_steps": 9}, {"max_steps": -1, "max_epochs": 1}])
@pytest.mark.parametrize("own", [False, True])
def test_more_switches_than_steps_is_an_error_before_the_first_batch(own, options):
    """And, where the module does not make its loaders itself, before singular values are computed."""
    module = (OwnLoader if own else Toy)(srlora(rank=2))
    with pytest.raises(UserError, match=mentions("10 switches", "9", "method.target_rank to 11")):
        trainer(**options).fit(module, None if own else loader(9))
    assert module.adaptation.started == own


@pytest.mark.parametrize("options", [{"fast_dev_run": True}, {"max_steps": 1}])
def test_runs_too_short_for_a_switch_say_so_and_train(options, caplog):
    module = Toy(srlora(rank=2))
    with caplog.at_level("INFO"):
        trainer(**options).fit(module, loader())
    assert "No switch falls into these 1 optimizer steps" in caplog.text
    assert module.adaptation.controller.progress().done == 0
    assert module.adaptation.controller.importance.smoothed.max() > 0


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield from toy_batches(4)


@pytest.mark.parametrize("options", [{"max_steps": -1, "max_epochs": -1}, {"max_steps": -1, "max_epochs": 2}])
def test_a_run_without_a_length_is_an_error_that_names_max_steps(options):
    with pytest.raises(UserError, match=mentions("trainer.max_steps")):
        trainer(**options).fit(Toy(), DataLoader(Endless(), batch_size=None))


class FSDPStrategy(SingleDeviceStrategy):
    """Stands for Lightning's, which refuses to be built without a GPU."""


class Manual(Toy):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class HeadOnly(Toy):
    def configure_optimizers(self):
        return torch.optim.SGD(self.net.head.requires_grad_(True).parameters(), lr=0.01)


@pytest.mark.parametrize(
    ("module", "options", "words"),
    [
        (Toy, {"callbacks": [WeightAveraging()]}, ["WeightAveraging", "SRLoRA", "such as LoRA"]),
        (
            Toy,
            {"callbacks": [StochasticWeightAveraging(1e-3)]},
            ["StochasticWeightAveraging", "SRLoRA", "such as LoRA"],
        ),
        (Toy, {"precision": "16-true"}, ["trainer.precision", "'16-true'"]),
        (Toy, {"precision": "bf16-true"}, ["trainer.precision", "'bf16-true'"]),
        (Toy, {"strategy": FSDPStrategy(torch.device("cpu"))}, ["trainer.strategy", "FSDPStrategy"]),
        (Manual, {}, ["manual optimization"]),
        (Toy, {"callbacks": [GradientAccumulationScheduler({0: 4})]}, ["GradientAccumulationScheduler"]),
        (HeadOnly, {}, ["optimizer", "blocks.0.qkv"]),
        (partial(Toy, LoRA(rank=2, lr_ratio=16.0)), {}, ["lr_ratio", "16", "param_groups"]),
        (partial(Toy, GaLore(rank=2)), {}, ["GaLore", "AdamW", "param_groups"]),
        (partial(Toy, LinearProbe()), {}, ["LinearProbe", "trainable", "['head']"]),
    ],
)
def test_what_cannot_be_right_is_refused_by_name(module, options, words):
    with pytest.raises(UserError, match=mentions(*words)):
        trainer(**options).fit(module(), loader())


def test_methods_without_switches_may_be_averaged():
    trainer(callbacks=[WeightAveraging()], max_steps=3).fit(Toy(LoRA(rank=2)), loader())


def test_a_hook_without_super_is_refused_when_the_class_is_made():
    with pytest.raises(TypeError, match=mentions("Bad.on_train_batch_end", "super().on_train_batch_end")):

        class Bad(Toy):
            def on_train_batch_end(self, outputs, batch, batch_idx):
                pass

    class Good(Toy):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            super().on_train_batch_end(outputs, batch, batch_idx)

    class Other:
        def setup(self, stage):
            pass

    with pytest.raises(TypeError, match=mentions("Other.setup", "super().setup")):

        class Mixed(Other, Toy):
            pass

    with pytest.raises(TypeError, match="before LightningModule"):

        class Order(L.LightningModule, SRLoRAMixin):
            pass


def test_saving_a_merged_model_is_refused(tmp_path):
    module = Toy()
    run = trainer(tmp_path, max_steps=5)
    run.fit(module, loader())
    module.adaptation.merge()
    with pytest.raises(UserError, match=r"unmerge\(\)"):
        run.save_checkpoint(tmp_path / "a.ckpt")


def test_one_module_adapts_one_network():
    module = Toy()
    with pytest.raises(UserError, match=mentions("Toy", "adapt()", "twice")):
        module.adapt(toy_net(), srlora())


def test_a_module_that_adapts_in_setup_is_told_so_where_it_is_loaded(tmp_path):
    class Late(Toy):
        def __init__(self):
            L.LightningModule.__init__(self)
            self.net = toy_net()
            self.optimizer, self.lr, self.options = torch.optim.AdamW, 0.01, {}

        def setup(self, stage):
            self.adapt(self.net, srlora())
            super().setup(stage)

    run = trainer(tmp_path, max_steps=5)
    run.fit(Late(), loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=mentions("Late", "self.adapt", "__init__")):
        Late.load_from_checkpoint(tmp_path / "a.ckpt")


class Saved(Toy):
    """As Lightning's guide has it: the hyperparameters are the arguments, and the method is one of them."""

    def __init__(self, method, lr=0.01):
        super().__init__(method, lr=lr)
        self.save_hyperparameters()


@pytest.mark.parametrize("method", [LoRA(rank=2), PiSSA(rank=2), srlora()], ids=["lora", "pissa", "srlora"])
def test_a_method_may_be_a_hyperparameter(method, tmp_path):
    module, run = Saved(method), trainer(tmp_path, max_steps=5)
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    again = Saved.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert again.adaptation.method.spec() == method.spec()
    assert_same(again, module)


def test_layers_that_never_get_a_gradient_are_named_at_the_end_of_a_short_run():
    module = Toy(LoRA(rank=2))
    module.net.blocks[1].forward = lambda x: x
    with pytest.warns(UserWarning, match=mentions("blocks.1.qkv", "3 steps")):
        trainer(max_steps=3).fit(module, loader())


def test_what_has_trained_once_is_in_the_checkpoint_though_it_is_frozen_again(tmp_path):
    class Compact(Toy):
        def __init__(self):
            L.LightningModule.__init__(self)
            self.net = toy_net()
            self.adapt(self.net, srlora(), pretrained=lambda: toy_net().state_dict())
            self.optimizer, self.lr, self.options = torch.optim.AdamW, 0.01, {}

    module = Compact()
    embed = module.net.embed.requires_grad_(True)
    trainer(max_steps=4).fit(module, loader())
    embed.requires_grad_(False)
    run = trainer(tmp_path, max_steps=4)
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    assert_same(Compact.load_from_checkpoint(tmp_path / "a.ckpt"), module)


def test_a_checkpoint_without_an_adaptation_is_refused():
    with pytest.raises(UserError, match=mentions("no adaptation")):
        Toy().on_load_checkpoint({"state_dict": {}})


def test_early_stopping_callback_is_compatible(tmp_path):
    module = Toy()
    stop = EarlyStopping("val/loss", patience=0, min_delta=10.0)
    trainer(tmp_path, callbacks=[stop], val_check_interval=5, limit_val_batches=1).fit(module, loader(), loader(2))
    assert module.adaptation.controller.progress().done == 1
