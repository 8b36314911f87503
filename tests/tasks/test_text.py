import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from scipy.stats import pearsonr
from sklearn.metrics import f1_score, log_loss, matthews_corrcoef
from torch import Tensor
from torch.utils.data import default_collate
from transformers import AutoTokenizer

from srlora_pl import LoRA, PiSSA, SRLoRA, TextClassifier
from srlora_pl.util.errors import UserError
from tests.helpers.encoders import BERT, DEBERTA, DEBERTA_V3_BASE, Data, ShuffledData, folder, samples
from tests.helpers.errors import mentions
from tests.helpers.paths import SHARED

TOKENIZER = SHARED / "models" / "deberta_v3_tokenizer"
ROWS = 22
CLASSES = torch.arange(ROWS) % 3 * torch.arange(ROWS) % 2
NUMBERS = torch.linspace(0, 5, ROWS)
LABELS = torch.stack([CLASSES, 1 - CLASSES, torch.arange(ROWS) % 2], -1).float()
PROBLEMS = {"single_label": (CLASSES, 2), "regression": (NUMBERS, 1), "multi_label": (LABELS, 3)}


@pytest.fixture
def classifier(tmp_path: Path) -> Callable[..., TextClassifier]:
    """Makes a small `TextClassifier` with random weights; keyword arguments override its own."""

    def make(config: dict[str, Any] = BERT, **overrides: Any) -> TextClassifier:
        torch.manual_seed(0)
        arguments = {
            "backbone": folder(tmp_path / config["model_type"], config),
            "num_classes": 2,
            "method": LoRA(rank=2),
            "lr": 0.01,
        }
        kwargs = {"pretrained": False} | overrides.pop("backbone_kwargs", {})
        return TextClassifier(**(arguments | overrides), backbone_kwargs=kwargs)

    return make


class Stop(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.step


def whole(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return default_collate(rows)


# What trains


@pytest.mark.parametrize(("train_pooler", "trainable"), [(True, 1_919_234), (False, 1_328_642)])
def test_deberta_v3_base_has_the_papers_number_of_parameters(tmp_path, train_pooler, trainable):
    with torch.device("meta"):
        model = TextClassifier(
            folder(tmp_path, DEBERTA_V3_BASE), 2, LoRA(rank=8), {"pretrained": False}, train_pooler=train_pooler
        )
    layers = model.adaptation.layers
    assert len(layers) == 72
    assert sum(layer.lora_A.numel() + layer.lora_B.numel() for layer in layers.values()) == 1_327_104
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trainable
    assert 184e6 < sum(p.numel() for p in model.parameters()) - 1_327_104 < 185e6


@pytest.mark.parametrize("config", [BERT, DEBERTA], ids=["bert", "deberta"])
@pytest.mark.parametrize("train_pooler", [True, False])
def test_head_pooler_and_adapters_train_and_nothing_else_moves(classifier, trainer, config, train_pooler):
    model = classifier(config, train_pooler=train_pooler)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer().fit(model, datamodule=Data(samples(ROWS, CLASSES)))
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    pairs = {n for n in before if ".lora_" in n}
    linears = {name.partition("layer.")[2][2:].rpartition(".")[0] for name in pairs}
    attention = ("query", "key", "value") if config is BERT else ("query_proj", "key_proj", "value_proj")
    assert linears == {
        *(f"attention.self.{name}" for name in attention),
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    }
    assert len(pairs) == 2 * 6 * 2
    pooler = "net.bert.pooler.dense" if config is BERT else "net.pooler.dense"
    heads = ["net.classifier", *([pooler] if train_pooler else [])]
    assert moved == pairs | {f"{head}.{kind}" for head in heads for kind in ("weight", "bias")}


def test_the_backbone_is_in_training_mode_while_it_trains(classifier, trainer):
    model = classifier(backbone_kwargs={"hidden_dropout_prob": 0.5})
    seen: list[bool] = []
    dropout = model.net.bert.encoder.layer[1].output.dropout
    assert dropout.p == 0.5
    dropout.register_forward_hook(lambda drop, args, output: seen.append(drop.training and bool((output == 0).any())))
    trainer(num_sanity_val_steps=2, max_steps=2).fit(model, datamodule=Data(samples(ROWS, CLASSES)))
    assert seen[:2] == [False, False]  # the validation before training
    assert seen[2:4] == [True, True]


def test_head_and_pooler_take_the_heads_learning_rate(classifier, trainer):
    model = classifier(head_lr=0.5)
    run = trainer(max_steps=1)
    run.fit(model, datamodule=Data(samples(ROWS, CLASSES)))
    slow, fast = run.optimizers[0].param_groups
    assert (slow["initial_lr"], fast["initial_lr"]) == (0.01, 0.5)
    assert {id(p) for p in fast["params"]} == {
        id(p) for m in (model.net.classifier, model.net.bert.pooler) for p in m.parameters()
    }


# The loss


def losses_by_hand(problem: str, logits: Tensor, label: Tensor, weights: Tensor) -> Tensor:
    if problem == "regression":
        return (logits - label) ** 2
    if problem == "multi_label":
        return -(weights * label * F.logsigmoid(logits) + (1 - label) * F.logsigmoid(-logits)).mean(-1)
    return -weights[label] * logits.log_softmax(-1)[torch.arange(len(label)), label]


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_loss_is_that_of_the_problem_and_never_the_networks_own(classifier, problem):
    label, classes = PROBLEMS[problem]
    weights = [0.5, 2.0, 4.0][:classes] if classes > 1 else None
    model = classifier(num_classes=classes, problem=problem, class_weights=weights).eval()
    given: list[dict] = []
    model.net.register_forward_pre_hook(lambda net, args, kwargs: given.append(kwargs), with_kwargs=True)
    batch = whole(samples(ROWS, label))
    logits = model.logits(batch)
    assert logits.shape == ((ROWS,) if classes == 1 else (ROWS, classes))
    expected = losses_by_hand(problem, logits, label, torch.tensor(weights or [1.0]))
    assert torch.allclose(model.losses(logits, label), expected, atol=1e-6)
    assert torch.allclose(model.training_loss(batch), expected.mean())
    assert [set(kwargs) for kwargs in given] == [{"input_ids", "attention_mask"}] * 2


def test_label_smoothing_acts_in_training_only(classifier):
    model, batch = classifier(label_smoothing=0.2).eval(), whole(samples(ROWS, CLASSES))
    log = model.logits(batch).log_softmax(-1)
    expected = -(0.8 * log[torch.arange(ROWS), CLASSES] + 0.2 * log.mean(-1)).mean()
    assert torch.allclose(model.training_loss(batch), expected)
    assert torch.allclose(model.losses(log, CLASSES), F.nll_loss(log, CLASSES, reduction="none"))


def test_padding_does_not_change_the_logits(classifier):
    for config in (BERT, DEBERTA):
        model, batch = classifier(config).eval(), whole(samples(ROWS, CLASSES))
        padded = {key: F.pad(value, (0, 7)) for key, value in batch.items() if value.ndim == 2}
        assert torch.allclose(model.logits(batch), model.logits(padded), atol=1e-6)
        assert model.logits(batch).std(0).min() > 1e-4


def test_token_types_reach_the_network(classifier):
    model, batch = classifier().eval(), whole(samples(ROWS, CLASSES))
    second = batch | {"token_type_ids": torch.ones_like(batch["input_ids"])}
    assert not torch.allclose(model.logits(batch), model.logits(second))


@pytest.mark.parametrize("problem", PROBLEMS)
def test_it_learns(classifier, trainer, problem):
    label, classes = PROBLEMS[problem]
    model = classifier(num_classes=classes, problem=problem, method=SRLoRA(rank=2, target_rank=4), schedule="constant")
    batch = whole(samples(ROWS, label))
    before = model.eval().training_loss(batch).item()
    model.train()
    trainer(max_steps=60).fit(model, datamodule=Data(samples(ROWS, label)))
    assert model.eval().training_loss(batch).item() < 0.7 * before
    assert model.adaptation.controller.progress().done == 1


# What the data say, and what the user says


def test_problem_and_scores_come_from_the_data(classifier, trainer, tmp_path):
    data = Data(samples(ROWS, LABELS), problem="multi_label", score_names=["accuracy", "f1"])
    model, run = classifier(num_classes=3), trainer()
    run.fit(model, datamodule=data)
    assert (model.problem, model.score_names, model.evaluation.main) == ("multi_label", ["accuracy", "f1"], "accuracy")
    run.save_checkpoint(tmp_path / "a.ckpt")
    again = TextClassifier.load_from_checkpoint(tmp_path / "a.ckpt")
    assert (again.problem, again.score_names) == ("multi_label", ["accuracy", "f1"])
    asked = classifier(num_classes=3, score_names=["f1"])
    trainer(max_steps=1).fit(asked, datamodule=data)
    assert asked.score_names == ["f1"]


def test_one_class_is_regression_without_a_word(classifier):
    model = classifier(num_classes=1)
    assert (model.problem, model.score_names) == ("regression", ["pearson", "spearman"])
    assert classifier().score_names == ["accuracy"]


def test_a_problem_other_than_the_datas_is_refused(classifier, trainer):
    data = Data(samples(ROWS, LABELS), problem="multi_label", score_names=["f1"])
    with pytest.raises(UserError, match=mentions("model.problem", "'single_label'", "'multi_label'")):
        trainer().fit(classifier(num_classes=3, problem="single_label"), datamodule=data)


@pytest.mark.parametrize(
    ("names", "weights", "expected"),
    [
        (["ham", "spam"], {"spam": 4.0, "ham": 1.0}, [1.0, 4.0]),
        # What YAML makes of {no: 1, yes: 4}, {1: 1, 0: 4} and {1e-3: 1, null: 4}.
        (["no", "yes"], {False: 1.0, True: 4.0}, [1.0, 4.0]),
        (["0", "1"], {1: 1.0, 0: 4.0}, [4.0, 1.0]),
        (["1e-3", "null"], {0.001: 1.0, None: 4.0}, [1.0, 4.0]),
        (["a: [", "1"], {"1": 1.0, "a: [": 4.0}, [4.0, 1.0]),
    ],
)
def test_class_weights_by_name_follow_the_classes_of_the_data(classifier, trainer, tmp_path, names, weights, expected):
    data = Data(samples(ROWS, CLASSES), problem="single_label", class_names=names)
    model, run = classifier(class_weights=weights), trainer(max_steps=1)
    run.fit(model, datamodule=data)
    assert model.class_weights.tolist() == expected
    logits = torch.randn(ROWS, 2)
    assert torch.allclose(
        model.losses(logits, CLASSES), losses_by_hand("single_label", logits, CLASSES, Tensor(expected))
    )
    run.save_checkpoint(tmp_path / "a.ckpt")
    again = TextClassifier.load_from_checkpoint(tmp_path / "a.ckpt")
    assert again.class_weights.tolist() == expected


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (
            {"ham": 1.0, "span": 4.0},
            ["'span'", "'spam'"],
        ),
        ({"ham": 1.0}, ["'spam'", "weight"]),
    ],
)
def test_class_weights_of_other_classes_are_refused(classifier, trainer, weights, words):
    data = Data(samples(ROWS, CLASSES), problem="single_label", class_names=["ham", "spam"])
    with pytest.raises(UserError, match=mentions("model.class_weights", *words)):
        trainer().fit(classifier(class_weights=weights), datamodule=data)
    with pytest.raises(UserError, match=mentions("'ham'", "named")):
        trainer().fit(classifier(class_weights=weights), datamodule=Data(samples(ROWS, CLASSES)))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"lr": 0.0}, ["model.lr", "0.0"]),
        ({"num_classes": 0}, ["model.num_classes", "0", "1"]),
        ({"num_classes": 1, "problem": "single_label"}, ["model.num_classes", "1", "2"]),
        ({"num_classes": 2, "problem": "regression"}, ["model.num_classes", "2", "1"]),
        ({"problem": "ranking"}, ["model.problem", "'ranking'", "single_label, multi_label, regression"]),
        ({"score_names": ["acuracy"]}, ["model.score_names", "'acuracy'", "'accuracy'"]),
        ({"class_weights": [1.0]}, ["model.class_weights", "[1.0]", "2 numbers"]),
        ({"class_weights": [1.0, 0.0]}, ["model.class_weights", "[1.0, 0.0]"]),
        ({"class_weights": {"a": 1.0, "b": -1.0}}, ["model.class_weights", "'b'", "-1.0"]),
        ({"num_classes": 1, "class_weights": {"a": 1.0}}, ["model.class_weights", "regression"]),
        ({"num_classes": 1, "class_weights": [1.0]}, ["model.class_weights", "regression"]),
        ({"label_smoothing": 1.0}, ["model.label_smoothing", "1.0"]),
        ({"problem": "multi_label", "label_smoothing": 0.1}, ["label_smoothing", "0.1", "0", "multi_label"]),
    ],
)
def test_values_out_of_range_are_refused_when_the_model_is_made(classifier, arguments, words):
    with pytest.raises(UserError, match=mentions(*words)):
        classifier(**arguments)


# Scores


def evaluated(run: Any, model: TextClassifier, data: Data, stage: str) -> dict[str, float]:
    run_stage = run.validate if stage == "val" else run.test
    return {key: value for part in run_stage(model, datamodule=data, verbose=False) for key, value in part.items()}


@pytest.mark.parametrize("stage", ["val", "test"])
def test_scores_are_those_of_scikit_learn_on_the_whole_split(classifier, trainer, stage):
    rows = samples(ROWS, CLASSES)
    data = Data(rows, problem="single_label", score_names=["matthews", "f1"])
    model = classifier().eval()
    model.net.classifier.weight.data *= 100  # random weights say one class only
    model.net.classifier.bias.data -= model.logits(whole(rows)).mean(0).detach()
    probability = model.logits(whole(rows)).softmax(-1).detach()
    said = probability.argmax(-1)
    assert 0 < said.sum() < ROWS
    matthews = matthews_corrcoef(CLASSES, said)
    expected = {"loss": log_loss(CLASSES, probability), "matthews": matthews, "score": matthews}
    expected["f1"] = f1_score(CLASSES, said)
    scores = evaluated(trainer(), model, data, stage)
    assert scores == pytest.approx({f"{stage}/{name}": value for name, value in expected.items()}, rel=1e-5)


@pytest.mark.parametrize("stage", ["val", "test"])
def test_the_second_loader_has_scores_of_its_own(classifier, trainer, stage):
    rows = samples(ROWS, CLASSES)
    model, run = classifier(), trainer()
    both = evaluated(run, model, Data(rows[:10], rows[10:]), stage)
    first, second = (evaluated(run, model, Data(part), stage) for part in (rows[:10], rows[10:]))
    assert both == first | {key.replace(stage, f"{stage}_2"): value for key, value in second.items()}
    assert set(both) == {f"{stage}{more}/{name}" for more in ("", "_2") for name in ("loss", "accuracy", "score")}
    assert first[f"{stage}/loss"] != second[f"{stage}/loss"]
    named = evaluated(run, model, Data(rows[:10], rows[10:], split_names={stage: (stage, f"{stage}_mm")}), stage)
    assert {key.replace(f"{stage}_mm", f"{stage}_2"): value for key, value in named.items()} == both


def test_regression_is_scored_by_its_correlation(classifier, trainer):
    rows, model = samples(ROWS, NUMBERS), classifier(num_classes=1).eval()
    scores = evaluated(trainer(), model, Data(rows), "val")
    value = model.logits(whole(rows)).detach()
    assert scores["val/score"] == scores["val/pearson"] == pytest.approx(pearsonr(value, NUMBERS)[0], rel=1e-4)
    assert scores["val/loss"] == pytest.approx(((value - NUMBERS) ** 2).mean().item(), rel=1e-5)


def test_labels_that_are_all_likely_are_counted_as_such(classifier, trainer):
    # All logits lie in (0, 1), where they could be taken for probabilities.
    model = classifier(num_classes=3, problem="multi_label")
    model.net.classifier.weight.data.zero_()
    model.net.classifier.bias.data = torch.tensor([0.1, 0.2, 0.3])
    scores = evaluated(trainer(), model, Data(samples(ROWS, LABELS)), "val")
    assert scores["val/f1"] == pytest.approx(f1_score(LABELS, torch.ones(ROWS, 3), average="micro"))


# Predictions


def test_predictions_name_their_samples(classifier, trainer):
    for problem, (label, classes) in PROBLEMS.items():
        rows = [{k: v for k, v in row.items() if k != "label"} for row in samples(ROWS, label)]
        model = classifier(num_classes=classes, problem=problem).eval()
        batches = trainer().predict(model, dataloaders=Data(rows).predict_dataloader())
        found = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
        assert found.pop("index").tolist() == list(range(ROWS))
        logits = model.logits(whole(rows))
        expected = {
            "single_label": {"label": logits.argmax(-1), "probability": logits.softmax(-1).amax(-1)},
            "multi_label": {"probabilities": logits.sigmoid()},
            "regression": {"value": logits},
        }[problem]
        assert found.keys() == expected.keys()
        assert all(torch.allclose(found[key], expected[key], atol=1e-6) for key in found)


# Checkpoints


@pytest.mark.parametrize("method", [LoRA(rank=2, alpha=3.0), PiSSA(rank=3), SRLoRA(target_rank=4, rank=2)])
def test_a_checkpoint_makes_the_model_again(classifier, trainer, tmp_path, method):
    model, run = classifier(DEBERTA, method=method, class_weights=[1.0, 2.0]), trainer()
    run.fit(model, datamodule=Data(samples(ROWS, CLASSES)))
    run.save_checkpoint(tmp_path / "a.ckpt")
    kept = torch.load(tmp_path / "a.ckpt", weights_only=True)["hyper_parameters"]
    assert kept["method"] == method.spec()
    again = TextClassifier.load_from_checkpoint(tmp_path / "a.ckpt")
    batch = whole(samples(ROWS, CLASSES))
    assert torch.equal(again.eval().logits(batch), model.eval().logits(batch))
    assert again.class_weights.tolist() == [1.0, 2.0]


def test_data_of_other_classes_than_those_of_the_fit_are_refused(classifier, trainer):
    rows = samples(12, CLASSES[:12])
    model, run = classifier(), trainer(max_steps=2)
    run.fit(model, datamodule=ShuffledData(rows))
    for use in (run.validate, run.test, run.predict):
        with pytest.raises(UserError, match=mentions("number 0", "'0'", "'1'")):
            use(model, datamodule=Data(rows, class_names=["1", "0"]))
    run.test(model, datamodule=Data(rows, class_names=["0", "1"]))
    trainer(max_steps=2).fit(model, datamodule=Data(rows, class_names=["1", "0"]))  # to learn others is another matter
    assert model.trained_classes == ["1", "0"]


def test_a_model_of_numbered_classes_goes_on_with_data_that_name_the_numbers(classifier, trainer):
    rows = samples(12, CLASSES[:12])
    model, run = classifier(), trainer(max_steps=2)
    run.fit(model, datamodule=ShuffledData(rows))
    run.test(model, datamodule=Data(rows, class_names=["no", "yes"], names_numbers=True))
    with pytest.raises(UserError, match="other classes"):
        run.test(model, datamodule=Data(rows, class_names=["no", "yes"]))


def test_a_checkpoint_of_other_classes_is_refused(classifier, trainer, tmp_path):
    rows = samples(12, CLASSES[:12])
    first = trainer(max_steps=2)
    first.fit(classifier(), datamodule=ShuffledData(rows))
    first.save_checkpoint(tmp_path / "a.ckpt")
    other = Data(rows, class_names=["0", "one"])
    again = trainer()
    for use in (again.validate, again.test, again.predict):
        with pytest.raises(UserError, match=mentions("number 1", "'1'", "'one'")):
            use(classifier(), datamodule=other, ckpt_path=tmp_path / "a.ckpt")
    again.validate(classifier(), datamodule=Data(rows, class_names=["0", "1"]), ckpt_path=tmp_path / "a.ckpt")


def test_a_checkpoint_of_another_model_is_refused(classifier, trainer, tmp_path):
    data, run = Data(samples(ROWS, CLASSES)), trainer(max_steps=1)
    run.fit(classifier(), datamodule=data)
    run.save_checkpoint(tmp_path / "a.ckpt")
    for change, words in [
        ({"train_pooler": False}, ["model.train_pooler", "True", "False"]),
        ({"problem": "multi_label"}, ["model.problem", "'single_label'", "'multi_label'"]),
        ({"backbone_kwargs": {"num_hidden_layers": 1}}, ["model.backbone_kwargs"]),
    ]:
        for start in (trainer().fit, trainer().test):
            with pytest.raises(UserError, match=mentions(*words)):
                start(classifier(**change), datamodule=data, ckpt_path=tmp_path / "a.ckpt")


def test_a_resumed_run_equals_the_uninterrupted_one(classifier, trainer, tmp_path):
    def model() -> TextClassifier:
        return classifier(DEBERTA, method=SRLoRA(rank=2, target_rank=6), warmup_steps=2)

    # Six batches an epoch, dropout at work, and a switch before and after the stop inside the second epoch.
    rows, once = samples(24, CLASSES.repeat(2)), trainer(max_steps=16)
    uninterrupted = model()
    once.fit(uninterrupted, datamodule=ShuffledData(rows))
    first = trainer(max_steps=16, callbacks=[Stop(8)])
    first.fit(model(), datamodule=ShuffledData(rows))
    first.save_checkpoint(tmp_path / "8.ckpt")
    resumed = model()
    trainer(max_steps=16).fit(resumed, datamodule=ShuffledData(rows), ckpt_path=tmp_path / "8.ckpt")
    assert uninterrupted.adaptation.controller.progress().done == 3
    there, here = uninterrupted.state_dict(), resumed.state_dict()
    assert all(torch.equal(there[key], here[key]) for key in there)


# The real one


@pytest.mark.real
@pytest.mark.skipif(not TOKENIZER.is_dir(), reason="needs ../shared")
@pytest.mark.slow
def test_deberta_v3_base_takes_a_step_of_128_tokens(tmp_path):
    torch.manual_seed(0)
    for file in TOKENIZER.iterdir():
        shutil.copy(file, tmp_path)
    model = TextClassifier(folder(tmp_path, DEBERTA_V3_BASE), 2, LoRA(rank=8), {"pretrained": False})
    assert model.backbone_name == str(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(model.backbone_name)
    texts = ["The more we study verbs, the crazier they get."] * 2
    batch = dict(tokenizer(texts, padding="max_length", max_length=128, truncation=True, return_tensors="pt"))
    assert batch["input_ids"].shape == (2, 128)
    batch["label"] = torch.tensor([0, 1])
    loss = model.training_loss(batch)
    assert 0.3 < loss < 1.5
    loss.backward()
    layer = model.adaptation.layers["deberta.encoder.layer.0.attention.self.query_proj"]
    assert layer.lora_B.grad.abs().max() > 0
    trained = [p for p in model.parameters() if p.requires_grad]
    before = layer.lora_B.clone()
    torch.optim.AdamW(trained, lr=1e-3).step()
    assert not torch.equal(layer.lora_B, before)
