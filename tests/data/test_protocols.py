"""What a user's own model or data lacks has a default, and the package's own classes have all that is asked."""

from types import SimpleNamespace

import lightning as L
import pytest

from srlora_pl import GLUEData, ImageClassifier, ImageData, InstructionData, LoRA, TextClassifier, TextData
from srlora_pl.data.protocols import UNSAID, DataForTask, ModelForData, data_of, model_of
from tests.helpers.encoders import BERT, folder
from tests.helpers.images import SMALL_VIT


def members(protocol: type) -> set[str]:
    return set(protocol.__annotations__)


def test_a_datamodule_that_says_nothing_has_defaults() -> None:
    for datamodule in (None, L.LightningDataModule()):
        data = data_of(SimpleNamespace(datamodule=datamodule))
        assert (data.num_classes, data.class_names, data.problem, data.padding_token) == (None, (), None, UNSAID)
        assert (data.split_names, data.has_validation, data.has_test_labels) == ({}, True, False)
        assert (data.sample_name(7), data.trial_batch, data.batch_size) == ("7", None, None)
    assert data_of(None).class_names == ()


def test_a_datamodule_is_asked_when_it_is_used() -> None:
    own = L.LightningDataModule()
    data = data_of(SimpleNamespace(datamodule=own))
    own.class_names, own.padding_token, own.sample_name = ["a", "b"], None, lambda index: f"row {index}"
    assert (data.class_names, data.padding_token, data.sample_name(2)) == (["a", "b"], None, "row 2")


def test_a_model_that_says_nothing_has_defaults() -> None:
    for module in (None, L.LightningModule()):
        model = model_of(SimpleNamespace(lightning_module=module))
        assert {getattr(model, name) for name in members(ModelForData) - {"tokenizer_options"}} == {None, False}
        assert model.tokenizer_options == {}


def test_a_name_that_is_no_member_is_refused() -> None:
    with pytest.raises(AttributeError, match="class_name"):
        data_of(None).class_name  # type: ignore[attr-defined]  # noqa: B018


def test_the_packages_own_classes_have_the_members(tmp_path) -> None:
    """A member that is renamed on one side alone would fall back to its default without a word."""
    table = tmp_path / "train.csv"
    table.write_text("text,label\na,x\nb,y\n")
    of_texts = {"problem", "score_names", "padding_token"}
    of_language_models = {"tokenizer", "generation", "question", "generation_batch"}
    for data in (ImageData("digits"), TextData(str(table)), GLUEData("mnli"), InstructionData(str(table))):
        expected = members(DataForTask) - (of_texts if isinstance(data, ImageData) else set())
        expected -= {"problem", "score_names"} if isinstance(data, InstructionData) else of_language_models
        there = set(dir(data))
        assert expected <= there | set(vars(data))
    image = ImageClassifier("vit_tiny_patch16_224", 3, LoRA(rank=2), SMALL_VIT)
    text = TextClassifier(folder(tmp_path / "bert", BERT), 2, LoRA(rank=2), {"pretrained": False})
    assert {"num_classes", "data_config"} <= set(dir(image))
    assert members(ModelForData) - {"data_config"} <= set(dir(text))


def test_glue_names_its_second_dev_set() -> None:
    assert GLUEData("mnli").split_names == {"val": ("val", "val_mm"), "test": ("test", "test_mm")}
    assert GLUEData("mnli", val_fraction=0.1).split_names == {"val": ("val",), "test": ("test", "test_mm")}
    assert GLUEData("cola").split_names == {"val": ("val",), "test": ("test",)}
