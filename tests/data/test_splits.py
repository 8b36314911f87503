import pytest
import torch

from srlora_pl.data.splits import hold_out, split_of
from srlora_pl.util.errors import UserError
from tests.helpers.errors import mentions


@pytest.mark.parametrize(
    ("split", "names"),
    [
        ("train", ["train", "Train", "TRAIN", "training", "Training", "train_set", "trainset", " train"]),
        ("val", ["val", "Val", "valid", "VALID", "validation", "Validation", "dev", "eval", "evaluation", "val-data"]),
        ("test", ["test", "Test", "testing", "TESTING", "test_images", "test split"]),
        (None, ["trains", "bullet_train", "invalid", "tests", "data", "images", "", "contest", "device", "train2"]),
    ],
)
def test_names_of_splits(split: str | None, names: list[str]) -> None:
    assert [split_of(name) for name in names] == [split] * len(names)


@pytest.mark.parametrize("kind", ["image", "text"])
def test_nothing_to_hold_out_has_one_of_two_reasons(kind: str) -> None:
    with pytest.raises(UserError, match=mentions("val_fraction", "0.9", f"{kind}s")):
        hold_out(torch.arange(50), 0.9, 0, kind)
    with pytest.raises(UserError, match=mentions("val_fraction", "0.01", "20", f"{kind}s")):
        hold_out(torch.arange(2).repeat(10), 0.01, 0, kind)
    with pytest.raises(UserError, match=mentions(f"one training {kind}", "val_fraction", "0.1")) as raised:
        hold_out(torch.zeros(1, dtype=torch.int64), 0.1, 0, kind)
    assert "class" not in str(raised.value)
    assert [len(rows) for rows in hold_out(torch.arange(50), 0.0, 0, kind)] == [50, 0]


def test_classes_that_validation_does_not_see_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    few = torch.tensor([0] * 10 + [1] * 10 + [2, 3])
    with caplog.at_level("INFO"):
        hold_out(few, 0.2, 0, "text")
        hold_out(few[:20], 0.2, 0, "text")
        hold_out(few, 0.0, 0, "text")
    (said,) = caplog.messages
    assert said.startswith("2 of the 4 classes have too few training texts")
