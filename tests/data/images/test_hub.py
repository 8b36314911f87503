"""Data sets of ``datasets``: their splits, and labels that are compared by name."""

import shutil
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image
from pyarrow import parquet

from srlora_pl.data.images.datamodule import ImageData
from srlora_pl.data.images.sources import find_source
from srlora_pl.util.errors import UserError
from tests.helpers.errors import mentions

LABEL, OTHER = ClassLabel(names=["cat", "dog", "owl"]), ClassLabel(names=["owl", "cat", "dog"])
TEXT, NUMBER = Value("string"), Value("int64")
PETS = ["cat", "dog", "owl"]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def picture() -> dict[str, Any]:
    file = BytesIO()
    Image.new("RGB", (4, 4)).save(file, "png")
    return {"bytes": file.getvalue(), "path": None}


def table(kind: Any, labels: list[Any], images: list[Any] | None = None) -> Dataset:
    """Labels of a kind, None for no column of labels, each beside a picture or the given cell."""
    features = {"image": ImageFeature()} | ({} if kind is None else {"label": kind})
    columns = {"image": images or [picture() for _ in labels]} | ({} if kind is None else {"label": labels})
    return Dataset.from_dict(columns, Features(features))


def as_parquet(root: Path, tables: dict[str, Dataset]) -> Path:
    root.mkdir()
    for name, each in tables.items():
        each.to_parquet(str(root / f"{name}.parquet"))
    return root


def as_parquet_in_folders(root: Path, tables: dict[str, Dataset]) -> Path:
    for name, each in tables.items():
        (root / name).mkdir(parents=True)
        each.to_parquet(str(root / name / "0000.parquet"))
    return root


def as_saved(root: Path, tables: dict[str, Dataset]) -> Path:
    DatasetDict(tables).save_to_disk(str(root))
    return root


def as_arrow_files(root: Path, tables: dict[str, Dataset]) -> Path:
    for path in as_saved(root, tables).rglob("*.json"):
        path.unlink()
    return root


WAYS = [as_parquet, as_parquet_in_folders, as_saved, as_arrow_files]


def source(root: Path) -> Any:
    return find_source(None, str(root), "image", "label")


def names(root: Path, split: str) -> list[str] | None:
    """The classes of a split's rows, None where it has no labels."""
    found = source(root)
    labels = found.load(split).labels
    return None if labels is None else [found.class_names[label] for label in labels]


@pytest.mark.parametrize("write", WAYS)
@pytest.mark.parametrize(
    ("train", "test", "wanted"),
    [
        ((LABEL, PETS), (OTHER, PETS), PETS),
        ((LABEL, PETS), (ClassLabel(names=["fox", *PETS]), PETS), PETS),  # no row is a fox
        ((LABEL, PETS), (ClassLabel(names=["owl", "cat"]), ["owl", "cat"]), ["owl", "cat"]),
        ((LABEL, PETS), (TEXT, PETS[::-1]), PETS[::-1]),
        ((LABEL, PETS), (Value("large_string"), PETS), PETS),
        ((LABEL, PETS), (NUMBER, [2, 0]), ["owl", "cat"]),
        ((TEXT, PETS), (OTHER, PETS), PETS),
        ((TEXT, ["3", "7"]), (NUMBER, [7, 3]), ["7", "3"]),
        ((NUMBER, [3, 7]), (TEXT, ["7", "3"]), ["7", "3"]),
        ((NUMBER, [3, 7]), (ClassLabel(names=["7", "3"]), ["7", "3"]), ["7", "3"]),
        ((NUMBER, [0, 1, 2]), (LABEL, ["owl", "cat"]), ["2", "0"]),
        ((Value("bool"), [True, False]), (NUMBER, [0, 1]), ["False", "True"]),
        ((LABEL, PETS), (LABEL, [None, -1]), None),
        ((LABEL, PETS), (TEXT, [None, ""]), None),
        ((LABEL, PETS), (None, [0, 0]), None),
    ],
)
def test_labels_are_compared_by_name(
    tmp_path: Path,
    write: Callable[..., Path],
    train: tuple[Any, list[Any]],
    test: tuple[Any, list[Any]],
    wanted: list[str] | None,
) -> None:
    root = write(tmp_path / "root", {"train": table(*train), "test": table(*test)})
    assert names(root, "train") == [str(value) for value in train[1]]
    assert names(root, "test") == wanted
    assert source(root).has_labels("test") == (wanted is not None)


@pytest.mark.parametrize(
    ("split", "kind", "labels", "words"),
    [
        (
            "test",
            ClassLabel(names=["fox", *PETS]),
            ["cat", "fox"],
            ["'fox'", "row 1 of the split 'test'", "'cat', 'dog'"],
        ),
        ("test", TEXT, ["cat", "CAT"], ["'CAT'", "row 1", "did you mean 'cat'?"]),
        ("test", TEXT, ["dog "], ["'dog '", "did you mean 'dog'?"]),
        ("test", NUMBER, [0, 3], ["is 3", "row 1", "none of the 3"]),
        ("test", LABEL, [0, None], ["row 1 of the split 'test'", "missing (None)"]),
        ("test", List(NUMBER), [[1]], ["holds List", "not classes"]),
        ("validation", LABEL, [-1, -1], ["row 0 of the split 'validation'", "missing (-1)"]),
        ("train", LABEL, ["cat", None, "dog"], ["row 1 of the split 'train'", "missing (None)"]),
        ("train", LABEL, [0, 1, -1], ["row 2 of the split 'train'", "missing (-1)"]),
        ("train", TEXT, ["cat", "dog", " "], ["row 2 of the split 'train'", "missing (' ')"]),
    ],
)
def test_a_label_that_means_nothing_is_refused(
    tmp_path: Path, split: str, kind: Any, labels: list[Any], words: list[str]
) -> None:
    root = as_saved(tmp_path / "root", {"train": table(LABEL, PETS), split: table(kind, labels)})
    with pytest.raises(UserError) as caught:
        names(root, "val" if split == "validation" else split)
    for word in ("'label'", *words):
        assert word in str(caught.value)


def test_numbers_that_may_be_names_or_places_are_refused(tmp_path: Path) -> None:
    train = table(ClassLabel(names=["1", "2", "3"]), ["1", "2", "3"])
    root = as_saved(tmp_path / "root", {"train": train, "test": table(NUMBER, [1, 2])})
    with pytest.raises(UserError, match=mentions("is 1", "'1'", "'2'", "'3'")):
        names(root, "test")


def test_files_of_one_split_with_their_classes_in_two_orders_are_refused(tmp_path: Path) -> None:
    tables = {"train-0": table(LABEL, PETS), "train-1": table(OTHER, PETS), "test": table(LABEL, PETS)}
    with pytest.raises(UserError, match=mentions("train-0.parquet", "train-1.parquet", "'train'")):
        source(as_parquet(tmp_path / "root", tables))


@pytest.mark.parametrize("write", [as_parquet, as_parquet_in_folders, as_saved])
@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("Train", "Val", "Test"),
        ("training", "Validation", "testing"),
        ("train", "dev", "TEST"),
        ("train_set", "val_set", "test_set"),
    ],
)
def test_splits_are_known_by_any_of_their_names(
    tmp_path: Path, write: Callable[..., Path], train: str, val: str, test: str
) -> None:
    tables = {train: table(LABEL, PETS), val: table(OTHER, ["dog"]), test: table(TEXT, ["owl"])}
    root = write(tmp_path / "root", tables)
    assert names(root, "train") == PETS
    assert names(root, "test") == ["owl"]
    assert names(root, "val") == ["dog"]


def test_splits_and_files_that_are_not_used_are_counted(tmp_path: Path) -> None:
    tables = {name: table(LABEL, PETS) for name in ("train", "Train", "validation", "dev", "extra")}
    left_out = source(as_saved(tmp_path / "saved", tables)).load("train").left_out
    assert left_out == {f"rows of the split {name!r}": 3 for name in ("Train", "dev", "extra")}
    root = as_parquet(tmp_path / "files", {name: table(LABEL, PETS) for name in ("train", "test", "extra")})
    assert source(root).load("train").left_out == {"file 'extra.parquet'": 1}


@pytest.mark.parametrize("cell", [None, {"bytes": b"", "path": None}, {"bytes": None, "path": ""}])
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_row_without_a_picture_is_named(tmp_path: Path, cell: Any, split: str) -> None:
    whole = table(LABEL, PETS)
    schema = whole.features.arrow_schema
    rows = pa.Table.from_pydict({"image": [picture(), picture(), cell], "label": [0, 1, 2]}, schema=schema)
    root = as_parquet(tmp_path / "root", {"train": whole, "test": whole})
    parquet.write_table(rows, root / f"{split}.parquet")  # which `datasets` itself refuses to write
    with pytest.raises(UserError, match=mentions("image 2", f"'{split}'", "root'", "missing")):
        source(root).load(split)


def test_a_picture_whose_file_is_gone_is_named_with_it(tmp_path: Path) -> None:
    images = [picture(), picture(), {"bytes": None, "path": str(tmp_path / "gone.png")}]
    (tmp_path / "root").mkdir()
    parquet.write_table(table(LABEL, PETS, images).data.table, tmp_path / "root" / "train.parquet")
    pictures = source(tmp_path / "root").load("train").images
    with pytest.raises(UserError, match=mentions("gone.png'", "image 2", "'train'")):
        pictures.decode(2, lambda image: image.size)


# -- `save_to_disk`


def test_a_single_table_is_the_training_split(tmp_path: Path) -> None:
    table(LABEL, PETS).save_to_disk(str(tmp_path / "root"))
    assert names(tmp_path / "root", "train") == PETS
    assert "test" not in source(tmp_path / "root").splits


@pytest.mark.parametrize(("train", "test"), [("train", "test"), ("Train", "Test")])
def test_tables_saved_apart_are_splits(tmp_path: Path, train: str, test: str) -> None:
    table(LABEL, PETS).save_to_disk(str(tmp_path / "root" / train))
    table(OTHER, PETS).save_to_disk(str(tmp_path / "root" / test))
    assert names(tmp_path / "root", "test") == PETS


def test_a_data_set_in_a_folder_below_or_one_that_is_torn_is_named(tmp_path: Path) -> None:
    as_saved(tmp_path / "root" / "deep", {"train": table(LABEL, PETS), "test": table(LABEL, PETS)})
    with pytest.raises(UserError, match=mentions("data.root", "root'", "root/deep'")):
        source(tmp_path / "root")
    shutil.rmtree(tmp_path / "root" / "deep" / "test")
    with pytest.raises(UserError, match=mentions("data.root", "deep'", "test")):
        source(tmp_path / "root" / "deep")


@pytest.mark.parametrize(("kind", "labels"), [(TEXT, ["cat", "cat"]), (ClassLabel(names=["cat"]), [0])])
def test_a_data_set_of_one_class_is_refused(kind: Any, labels: list[Any], tmp_path: Path) -> None:
    root = as_parquet(tmp_path / "root", {"train": table(kind, labels)})
    with pytest.raises(UserError, match=f"data.root '{root}' has no two classes, only 'cat';"):
        ImageData(root=str(root))


# -- images beside a metadata.csv


def with_metadata(root: Path, label: str = "label", places: tuple[str, ...] = ("train", "test")) -> Path:
    """Splits of six images each, among them one without a row."""
    for place in places:
        (root / place).mkdir(parents=True)
        for number in range(6):
            Image.new("RGB", (4, 4)).save(root / place / f"{number}.png")
        rows = [f"{number}.png,{PETS[number % 3]}" for number in (4, 3, 2, 1, 0)]
        (root / place / "metadata.csv").write_text("\n".join([f"file_name,{label}", *rows]))
    return root


def test_images_and_labels_are_those_of_the_rows(tmp_path: Path) -> None:
    found = source(with_metadata(tmp_path / "pets"))
    for name in ("train", "test"):
        split = found.load(name)
        assert [PETS[label] for label in split.labels] == ["dog", "cat", "owl", "dog", "cat"]
        assert [split.images.file(row).name for row in range(5)] == [f"{row}.png" for row in (4, 3, 2, 1, 0)]
    assert found.load("train").left_out == {"images without a row of metadata": 2}


def test_metadata_behind_links_to_folders(tmp_path: Path) -> None:
    real = with_metadata(tmp_path / "real")
    (tmp_path / "linked").mkdir()
    for name in ("train", "test"):
        (tmp_path / "linked" / name).symlink_to(real / name)
    found = source(tmp_path / "linked")
    assert len(found.load("train").images) == len(found.load("test").images) == 5


def test_metadata_without_labels_is_left_out_beside_class_folders_and_refused_otherwise(tmp_path: Path) -> None:
    root = with_metadata(tmp_path / "pets", "lable", ("cat", "dog"))
    split = source(root).load("train")
    assert (len(split.images), split.left_out) == (12, {".csv": 2})
    with pytest.raises(UserError, match=mentions("data.label_column", "'label'", "'lable'", "metadata.csv")):
        source(with_metadata(tmp_path / "one", "lable", ("",)))
