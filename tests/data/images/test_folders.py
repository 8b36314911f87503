"""Folders of images: which of them are splits and which are classes, and what is left out of them."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from srlora_pl.data.images.folders import _JUNK, Folder, picture_files
from srlora_pl.data.images.sources import find_source
from srlora_pl.data.splits import split_of
from srlora_pl.util.errors import UserError
from tests.helpers.errors import mentions

Tree = Callable[..., Path]
of_bytes = pytest.mark.skipif(sys.platform != "linux", reason="other systems take fewer names for a file")


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """Make empty files: ``tree("cat/0.png")``; a name that ends in a slash makes a folder."""

    def _make(*names: str) -> Path:
        for name in names:
            path = tmp_path / "root" / name
            (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
            if not name.endswith("/"):
                path.touch()
        return tmp_path / "root"

    return _make


def pets(*splits: str) -> list[str]:
    return [f"{split}/{name}/0.png" for split in splits for name in ("cat", "dog")]


def paths(images: object) -> list[Path]:
    return images.paths  # type: ignore[attr-defined]


# -- splits and classes


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("train", "val", "test"),
        ("Train", "Val", "Test"),
        ("TRAIN", "VALIDATION", "TEST"),
        ("training", "valid", "testing"),
        ("train", "dev", "Test"),
        ("training_set", "eval", "test_set"),
    ],
)
def test_splits_are_known_by_any_of_their_names(tree: Tree, train: str, val: str, test: str) -> None:
    source = Folder(tree(*pets(train, val, test)))
    assert source.class_names == ["cat", "dog"]
    for split, name in (("train", train), ("val", val), ("test", test)):
        assert {path.parent.parent.name for path in paths(source.load(split).images)} == {name}
    assert source.has_labels("test")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (pets("Train", "training"), ["split train", "Train, training"]),
        ([*pets("train"), "training/0.png"], ["split train", "train, training"]),
        (pets("train", "val", "valid"), ["split val", "val, valid"]),
        (pets("test", "val"), ["test, val", "no class folders to train on", "root/train"]),
        (pets("Test"), ["Test", "no class folders to train on"]),
        (["train/0.png", "test/0.png"], ["test, train", "no class folders to train on"]),
        (["train/0.png"], ["train", "no class folders to train on"]),
        (pets("seg_train", "seg_test"), ["seg_test, seg_train", "no class folders to train on"]),
        (pets("train2017", "val2017"), ["train2017, val2017", "no class folders to train on"]),
        (["cat/0.png", "dog/0.png", *pets("test")], ["'cat'", "'test'", "root/train"]),
        ([*pets("train"), "val/0.png"], ["root/val", "no class folders"]),
        ([*pets("train"), "val/Cat/0.png"], ["'Cat'", "did you mean 'cat'"]),
    ],
)
def test_splits_that_cannot_be_told(tree: Tree, names: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        Folder(tree(*names)).load("val")
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("name", ["train", "Test", "valid", "dev"])
def test_a_class_may_be_called_like_a_split(tree: Tree, name: str) -> None:
    source = Folder(tree("car/0.png", f"{name}/0.png", "ship/0.png"))
    assert source.class_names == sorted(["car", name, "ship"])
    assert "test" not in source.splits


# -- what is left out


def test_each_kind_of_what_is_left_out_is_counted(tree: Tree) -> None:
    files = [
        "0.png",
        "1.JPG",
        "2.heic",
        "3.HEIC",
        "4.gif",
        "5.jfif",
        "6.CR2",
        "7.txt",
        "Thumbs.db",
        "noending",
        "d.png/8.png",
    ]
    junk = [".hidden.png", "._0.png", ".DS_Store", ".thumbnails/0.png", "@eaDir/0.png", "__MACOSX/0.png"]
    root = tree(*(f"cat/{name}" for name in files + junk), "dog/0.png", "stray.png", "labels.csv", ".git/x.png")
    os.symlink("nowhere", root / "cat" / "gone.png")
    os.symlink("loop.png", root / "cat" / "loop.png")
    os.mkfifo(root / "dog" / "pipe.png")
    kinds = {
        ".heic": 2,
        ".gif": 1,
        ".jfif": 1,
        ".cr2": 1,
        ".txt": 1,
        ".db": 1,
        "without an ending": 1,
        "hidden": 7,
        ".csv": 1,
    }
    kinds |= {"broken link": 2, "no regular file": 1}
    train = Folder(root).load("train")
    assert [str(path.relative_to(root)) for path in paths(train.images)] == [
        "cat/0.png",
        "cat/1.JPG",
        "cat/d.png/8.png",
        "dog/0.png",
    ]
    assert train.left_out == {**kinds, "outside the class folders": 1}
    whole = picture_files(root, "data.predict_root")
    assert len(whole.images) == 5
    assert whole.left_out == kinds


def test_what_lies_beside_the_splits_is_counted_once(tree: Tree) -> None:
    source = Folder(tree(*pets("train", "test"), "unlabelled/0.png", "0.png", "train/1.png", "test/2.png", "__MACOSX/"))
    outside = {"outside the class folders": 2, "folder 'unlabelled'": 1, "hidden": 1}
    assert source.load("train").left_out == outside
    assert source.load("test").left_out == {"outside the class folders": 1}


def test_only_hidden_folders_below_the_root_are_left_out(tree: Tree) -> None:
    root = tree(".cache/photos/0.png", ".cache/photos/.trash/1.png")
    assert [path.name for path in paths(picture_files(root / ".cache" / "photos", "key").images)] == ["0.png"]
    assert len(picture_files(root / ".cache" / "photos" / ".trash" / "1.png", "key").images) == 1
    with pytest.raises(UserError, match=mentions("no images")):
        picture_files(root, "key")


def test_links_to_folders_are_followed_but_not_in_circles(tree: Tree) -> None:
    root = tree("root/cat/0.png", "root/dog/", "elsewhere/deep/1.png") / "root"
    os.symlink(root.parent / "elsewhere", root / "owl")
    os.symlink(root.parent / "elsewhere" / "deep", root / "dog" / "link")
    os.symlink(root, root / "dog" / "up")
    split = Folder(root).load("train")
    assert [path.relative_to(root).as_posix() for path in paths(split.images)] == [
        "cat/0.png",
        "dog/link/1.png",
        "owl/deep/1.png",
    ]
    assert split.left_out == {"link in a circle": 1}
    assert len(picture_files(root, "key").images) == 3


def test_a_folder_that_may_not_be_read_is_counted(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tree("cat/0.png", "cat/closed/1.png", "dog/0.png")
    scan = os.scandir

    def refuse(path: Path) -> object:
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert Folder(root).load("train").left_out == {"unreadable folder": 1}


# -- names


@of_bytes
def test_a_class_whose_name_is_not_utf8_is_refused(tree: Tree) -> None:
    with pytest.raises(UserError, match=mentions("'caf\\udce9'", "root'", "UTF-8")):
        Folder(tree("caf\udce9/0.png", "dog/0.png"))


@of_bytes
def test_a_file_whose_name_is_not_utf8_is_read(tree: Tree) -> None:
    split = Folder(tree("cat/caf\udce9.png", "dog/0.png")).load("train")
    assert [split.name(index)[-8:] for index in range(2)] == ["caf\udce9.png", "og/0.png"]


_LETTERS = st.characters(exclude_categories=["Cs"], exclude_characters="/\0")
_NAMES = st.one_of(
    st.text(_LETTERS, min_size=1, max_size=40),
    st.sampled_from(
        ["train", "val", "10", "9", "1e-3", "null", "a b", "a.png", "a.jsonl", "…", "é", "e\u0301", "x" * 250]
    ),
).filter(lambda name: not name.startswith(".") and len(name.encode()) <= 251)


@of_bytes
@settings(deadline=None, max_examples=60, derandomize=True)
@given(tree=st.dictionaries(_NAMES, st.sets(_NAMES, min_size=1, max_size=3), min_size=2, max_size=4))
def test_the_classes_are_what_the_folders_are_called(tree: dict[str, set[str]]) -> None:
    assume(not all(map(split_of, tree)) and not any(name.casefold() in _JUNK for name in tree))
    with TemporaryDirectory() as folder:
        for name, files in tree.items():
            Path(folder, name).mkdir()
            for file in files:
                Path(folder, name, f"{file}.png").touch()
        source = find_source(None, folder, "image", "label")
        split = source.load("train")
    assert source.class_names == sorted(tree)
    assert isinstance(split.labels, Tensor)
    found = [
        (source.class_names[label], path.name) for label, path in zip(split.labels, paths(split.images), strict=True)
    ]
    assert found == [(path.parent.name, path.name) for path in paths(split.images)]
    assert found == [(name, file) for name in sorted(tree) for file in sorted(f"{each}.png" for each in tree[name])]
