import warnings

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn import metrics as sk
from torch import Tensor

from srlora_pl.tasks.scores import OneClass, ScoreOfAll, metrics
from srlora_pl.util.errors import UserError
from tests.helpers.errors import mentions


def computed(problem: str, names: list[str], classes: int, preds: Tensor, target: Tensor) -> dict[str, float]:
    """The scores after batches of 7."""
    found = metrics(problem, names, classes)
    for metric in found.values():
        for p, t in zip(preds.split(7), target.split(7), strict=True):
            metric.update(preds=p, target=t)
    return {name: float(metric.compute()) for name, metric in found.items()}


def one_hot(labels: list[int], classes: int) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(labels), classes).float()


def single_label(truth: list[int], said: list[int], classes: int) -> None:
    found = computed(
        "single_label", ["accuracy", "f1", "matthews"], classes, one_hot(said, classes), torch.tensor(truth)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn on undefined scores
        expected = {
            "accuracy": sk.accuracy_score(truth, said),
            "f1": sk.f1_score(truth, said, average="binary" if classes == 2 else "macro"),
            "matthews": sk.matthews_corrcoef(truth, said),
        }
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_single_label_scores_on_random_labels(classes):
    draw = np.random.default_rng(classes)
    truth = draw.integers(classes, size=101)
    said = np.where(draw.random(101) < 0.4, truth, draw.integers(classes, size=101))
    single_label(truth.tolist(), said.tolist(), classes)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize(
    ("truth", "said"),
    [
        ([0] * 9, [0] * 9),  # one class only, always right
        ([1] * 9, [1] * 9),
        ([0] * 9, [1] * 9),  # never right
        ([1] * 9, [0] * 9),
        ([0, 1] * 6, [0] * 12),  # constant predictions
        ([0, 1] * 6, [1] * 12),
        ([0] * 12, [0, 1] * 6),  # one class only
        ([1] * 12, [0, 1] * 6),
        ([0, 1] * 6, [1, 0] * 6),
        ([1], [1]),
    ],
)
def test_single_label_scores_on_degenerate_labels(truth, said, classes):
    single_label(truth, said, classes)


def test_matthews_of_one_class_is_zero():
    assert computed("single_label", ["matthews"], 2, one_hot([0] * 9, 2), torch.zeros(9).long()) == {"matthews": 0.0}


def test_counts_do_not_overflow():
    truth = torch.arange(2).repeat(500_000)
    assert computed("single_label", ["matthews"], 2, one_hot([0, 1], 2).repeat(500_000, 1), truth)["matthews"] == 1


def numbers(x: np.ndarray, y: np.ndarray) -> None:
    found = computed("regression", ["pearson", "spearman"], 1, torch.tensor(x), torch.tensor(y))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SciPy on constant input
        expected = {"pearson": stats.pearsonr(x, y)[0], "spearman": stats.spearmanr(x, y)[0]}
    assert found == pytest.approx(expected, rel=1e-6, nan_ok=True)


def test_correlations_on_random_numbers():
    draw = np.random.default_rng(0)
    y = draw.random(150).astype("float32") * 5
    numbers(y + draw.standard_normal(150).astype("float32"), y)


def test_correlations_far_from_zero():
    draw = np.random.default_rng(1)
    y = draw.random(150).astype("float32")
    numbers(1000 + y + draw.random(150).astype("float32"), y)


def test_correlations_with_ties():
    draw = np.random.default_rng(2)
    numbers(draw.integers(4, size=150).astype("float32"), draw.integers(6, size=150).astype("float32") / 5)


@pytest.mark.parametrize(
    ("x", "y"), [([0.1] * 9, [*range(9)]), ([*range(9)], [3.3] * 9), ([0.1] * 9, [3.3] * 9), ([1, 2], [1, 2])]
)
def test_correlations_on_degenerate_numbers(x, y):
    numbers(np.array(x, "float32"), np.array(y, "float32"))


def test_a_constant_has_no_correlation_and_is_no_crash():
    found = computed("regression", ["pearson", "spearman"], 1, torch.full((9,), 0.1), torch.arange(9.0))
    assert all(np.isnan(value) for value in found.values())


@pytest.mark.parametrize("case", ["random", "none set", "all right", "none said"])
def test_multi_label_scores(case):
    draw = np.random.default_rng(3)
    truth, said = draw.integers(2, size=(2, 60, 4))
    if case == "none set":
        truth[:] = said[:] = 0
    elif case == "all right":
        said = truth
    elif case == "none said":
        said[:] = 0
    found = computed("multi_label", ["f1", "accuracy"], 4, torch.tensor(said), torch.tensor(truth).float())
    expected = {
        "f1": sk.f1_score(truth, said, average="micro", zero_division=0),
        "accuracy": sk.accuracy_score(truth, said),
    }
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([], ["model.score_names", "[]"]),
        (["mathews"], ["'mathews'", "'matthews'"]),
        (["pearson"], ["'pearson'", "single_label", "accuracy, f1, matthews"]),
    ],
)
def test_unknown_scores_are_refused(names, words):
    with pytest.raises(UserError, match=mentions(*words)):
        metrics("single_label", names, 2)


def test_a_mean_does_not_depend_on_how_the_batches_are_cut():
    values = torch.rand(10_000, generator=torch.Generator().manual_seed(0)) + torch.arange(10_000) % 7 * 1000
    means = []
    for size in (1, 64, 10_000):
        # Moving resets the dtype that torchmetrics' own mean casts to.
        metric = ScoreOfAll(torch.mean, "value").to("cpu")
        for batch in values.split(size):
            metric.update(value=batch)
        means.append(float(metric.compute()))
    assert means == pytest.approx([float(values.double().mean())] * 3, rel=1e-14)
    metric.update(value=torch.tensor([torch.nan]))
    assert metric.compute().isnan()


@pytest.mark.parametrize(
    ("said", "truth", "expected"),
    [
        ([2, 2, 2, 2, 2], [0, 1, 2, 2, 1], [2, 5]),
        ([0, 0, 0, 0, 0], [0, 0, 0, 0, 1], [0, 5]),
        ([2, 2, 2, 2, 1], [0, 1, 2, 2, 1], [-1, 5]),
        ([2, 2, 2, 2, 2], [2, 2, 2, 2, 2], [-1, 5]),  # no wonder
    ],
)
def test_the_one_class_that_all_predictions_are(said, truth, expected):
    metric = OneClass()
    for preds, target in zip(one_hot(said, 3).split(2), torch.tensor(truth).split(2), strict=True):
        metric.update(preds, target)
    assert metric.compute().tolist() == expected


def test_numbers_and_several_labels_are_no_one_class():
    metric = OneClass()
    metric.update(torch.ones(4), torch.arange(4.0))
    metric.update(torch.ones(4, 3), torch.eye(4)[:, :3])
    assert metric.compute().tolist() == [-1, 0]
