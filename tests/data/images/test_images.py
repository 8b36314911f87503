"""Sources of images: what they hold, what they say about bad input, and that both paths give the same batches."""

import functools
import http.server
import io
import pickle
import tarfile
import threading
from collections.abc import Callable, Iterator
from hashlib import md5
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageFile
from sklearn.datasets import load_digits
from torch import Tensor
from torchvision.datasets import CIFAR10

from srlora_pl.data.images.datamodule import FileImages, ImageData, MemoryImages
from srlora_pl.data.images.folders import picture_files
from srlora_pl.data.images.pictures import Files
from srlora_pl.data.images.transforms import ImageTransform, check_mode, to_rgb
from srlora_pl.util.errors import UserError
from tests.helpers.data import attach
from tests.helpers.errors import mentions
from tests.helpers.paths import SHARED

Tree = Callable[..., Path]


def batches(data: ImageData, loader: Any) -> dict[str, Tensor]:
    """All batches of a loader after the device's part, as one."""
    done = [data.on_after_batch_transfer(batch, 0) for batch in loader]
    return {key: torch.cat([batch[key] for batch in done]) for key in done[0]}


def ready(stage: str = "fit", size: int = 16, **options: Any) -> ImageData:
    data = attach(ImageData(**{"batch_size": 4, "val_fraction": 0.2, **options}), size=size)
    data.prepare_data()
    data.setup(stage)
    return data


# -- digits


def test_digits_are_scikit_learns() -> None:
    data = ImageData("digits")
    assert data.class_names == [str(digit) for digit in range(10)]
    train, test = data.source.load("train"), data.source.load("test")
    assert (len(train.labels), len(test.labels)) == (1437, 360)  # type: ignore[arg-type]
    assert test.labels.bincount().tolist() == [36] * 10  # type: ignore[union-attr]

    known = load_digits()
    ours = torch.cat([train.images, test.images]).flatten(1)  # type: ignore[list-item]
    theirs = torch.from_numpy(known.data * 255 / 16).round().byte()
    table = {row.tobytes(): label for row, label in zip(theirs.numpy(), known.target, strict=True)}
    labels = torch.cat([train.labels, test.labels])  # type: ignore[list-item]
    assert [table.pop(row.tobytes()) for row in ours.numpy()] == labels.tolist()
    assert not table


def test_batches_of_digits() -> None:
    data = ready(name="digits", batch_size=64, val_fraction=0.1)
    seen = batches(data, data.train_dataloader())
    assert seen["image"].shape == (1293, 3, 16, 16)
    assert seen["image"].dtype == torch.float32
    assert set(seen) == {"image", "label", "index"}
    train = data.source.load("train")
    rows = data.train_set.rows[seen["index"]]  # type: ignore[union-attr]
    assert torch.equal(seen["label"], train.labels[rows])  # type: ignore[index]

    held, kept = set(data.val_set.rows.tolist()), set(data.train_set.rows.tolist())  # type: ignore[union-attr]
    assert not held & kept
    assert held | kept == set(range(1437))

    val = batches(data, data.val_dataloader())
    expected = data.transform.normalise(data.transform.test(train.images[data.val_set.rows]))  # type: ignore
    torch.testing.assert_close(val["image"], expected)
    # mean 0.5, std 0.2 of the first channel: black is -2.5, white 2.5
    assert val["image"][:, 0].min() == -2.5
    assert val["image"][:, 0].max() == pytest.approx(2.5)


def test_prediction_has_no_labels() -> None:
    data = ready("predict", name="digits")
    assert set(batches(data, data.predict_dataloader())) == {"image", "index"}
    assert data.sample_name(17) == "17"


# -- the user's own folder


def test_train_val_test_folders(image_tree: Tree) -> None:
    names = [f"{split}/{name}" for split in ("train", "valid", "test") for name in ("ant", "bee", "cow")]
    data = ready(root=str(image_tree(dict.fromkeys(names, (20, 24)), count=4)))
    assert data.class_names == ["ant", "bee", "cow"]
    assert (len(data.train_set), len(data.val_set)) == (12, 12)  # type: ignore[arg-type]
    assert data.has_test_labels
    assert batches(data, data.val_dataloader())["label"].bincount().tolist() == [4, 4, 4]


def test_flat_folder_is_split_by_class(image_tree: Tree) -> None:
    data = ready(root=str(image_tree({"ant": (20, 24), "train": (20, 24)}, count=10)))
    assert data.class_names == ["ant", "train"]  # a class may well be called so
    assert batches(data, data.val_dataloader())["label"].bincount().tolist() == [2, 2]
    assert not data.has_test_labels


def test_both_paths_give_the_same_batches(image_tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    root = str(image_tree({"a": (40, 24), "b": (40, 24)}, count=8))
    memory = ready(root=root)
    assert isinstance(memory.train_set, MemoryImages)
    monkeypatch.setattr("srlora_pl.data.images.pictures.SMALL", 30)
    for workers in (0, 2):
        files = ready(root=root, num_workers=workers)
        assert isinstance(files.train_set, FileImages)
        for loader in ("train_dataloader", "val_dataloader"):
            one = batches(memory, getattr(memory, loader)())
            other = batches(files, getattr(files, loader)())
            assert one["index"].tolist() == other["index"].tolist()
            assert one["label"].tolist() == other["label"].tolist()
            # a grey level is 1 / 255 / std
            torch.testing.assert_close(one["image"], other["image"], atol=1.01 / 255 / 0.2, rtol=0)


def test_images_of_many_sizes(image_tree: Tree) -> None:
    data = ready(root=str(image_tree({"a": (40, 24), "b": (20, 30)})))
    assert isinstance(data.train_set, FileImages)
    assert batches(data, data.train_dataloader())["image"].shape[1:] == (3, 16, 16)


def test_predict_a_folder_or_a_file(image_tree: Tree) -> None:
    root = image_tree({"deep/er": (9, 9), "other": (12, 9)}, count=2)
    data = ready("predict", name="digits", predict_root=str(root))
    assert batches(data, data.predict_dataloader())["image"].shape == (4, 3, 16, 16)
    assert data.sample_name(0) == str(root / "deep/er/0.png")
    one = ready("predict", name="digits", predict_root=str(root / "other/1.png"))
    assert len(one.predict_set) == 1  # type: ignore[arg-type]


def test_unlabelled_test_folder_is_for_prediction(image_tree: Tree) -> None:
    root = image_tree({"train/a": (9, 9), "train/b": (9, 9), "test": (9, 9)}, count=5)
    data = ready("predict", root=str(root))
    assert not data.has_test_labels
    assert set(batches(data, data.predict_dataloader())) == {"image", "index"}
    with pytest.raises(UserError, match=mentions("labelled test split")):
        data.setup("test")


# -- `datasets`


def table(root: Path, split: str, labels: Any, feature: Any, size: int = 10) -> None:
    from datasets import Dataset, Features
    from datasets import Image as ImageFeature

    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (size, size), dtype=np.uint8)) for _ in labels]
    features = Features({"picture": ImageFeature(), "kind": feature})
    root.mkdir(exist_ok=True)
    Dataset.from_dict({"picture": images, "kind": labels}, features).to_parquet(str(root / f"{split}-0.parquet"))


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


OWN = {"image_column": "picture", "label_column": "kind"}


def test_table_of_names(tmp_path: Path) -> None:
    from datasets import Value

    table(tmp_path / "t", "train", ["cat", "dog"] * 10, Value("string"))
    table(tmp_path / "t", "test", ["dog", "dog", "cat"], Value("string"))
    data = ready(root=str(tmp_path / "t"), **OWN)
    assert data.class_names == ["cat", "dog"]
    seen = batches(data, data.train_dataloader())
    assert seen["image"].shape == (16, 3, 16, 16)
    assert seen["label"].bincount().tolist() == [8, 8]
    assert data.has_test_labels
    data.setup("test")
    assert batches(data, data.test_dataloader())["label"].tolist() == [1, 1, 0]


def test_table_with_class_label_and_hidden_test_labels(tmp_path: Path) -> None:
    from datasets import ClassLabel

    table(tmp_path / "t", "train", [0, 1, 2] * 6, ClassLabel(names=["x", "y", "z"]))
    table(tmp_path / "t", "test", [-1, -1], ClassLabel(names=["x", "y", "z"]))
    data = ready("predict", root=str(tmp_path / "t"), **OWN)
    assert data.class_names == ["x", "y", "z"]
    assert not data.has_test_labels
    assert len(data.predict_set) == 2  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"image_column": "pictures"}, ["data.image_column", "'pictures'", "'picture'"]),
        ({"label_column": "label"}, ["data.label_column", "'label'"]),
        ({"image_column": "kind"}, ["'kind'", "picture"]),
        ({"label_column": "picture"}, ["data.label_column", "'picture'", "Image"]),
    ],
)
def test_wrong_columns(tmp_path: Path, columns: dict[str, str], words: list[str]) -> None:
    from datasets import Value

    table(tmp_path / "t", "train", ["cat", "dog"] * 3, Value("string"))
    with pytest.raises(UserError, match=mentions(*words)):
        ImageData(root=str(tmp_path / "t"), **{**OWN, **columns})  # type: ignore[arg-type]


@pytest.mark.parametrize("stage", ["fit", "test"])
def test_label_unknown_in_training(stage: str, tmp_path: Path) -> None:
    from datasets import Value

    table(tmp_path / "t", "train", ["cat", "dog"] * 5, Value("string"))
    table(tmp_path / "t", "test", ["cat", "cow"], Value("string"))
    with pytest.raises(UserError, match="'cow'"):
        ready(stage, root=str(tmp_path / "t"), **OWN)


def test_unreachable_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(_: str) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(UserError, match=mentions("data.root", "'some/name'")):
        ImageData(root="some/name")


# -- downloads


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """A web server on this machine that gives out ``tmp_path/www``."""
    (tmp_path / "www").mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "www"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def small_cifar(www: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CIFAR-10 of 20 + 10 images in the real one's format, where torchvision will look for it."""
    parts = {
        name: pickle.dumps({"data": np.full((10, 3072), shade, np.uint8), "labels": list(range(10))})
        for name, shade in (("data_batch_1", 10), ("data_batch_2", 20), ("test_batch", 30))
    }
    parts["batches.meta"] = pickle.dumps({"label_names": list("abcdefghij")})
    with tarfile.open(www / "cifar.tar.gz", "w:gz") as archive:
        for name, content in parts.items():
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    sums = {name: md5(content).hexdigest() for name, content in parts.items()}
    monkeypatch.setattr(CIFAR10, "url", f"{url}/cifar.tar.gz")
    monkeypatch.setattr(CIFAR10, "filename", "cifar.tar.gz")
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5((www / "cifar.tar.gz").read_bytes()).hexdigest())
    monkeypatch.setattr(CIFAR10, "train_list", [[n, sums[n]] for n in ("data_batch_1", "data_batch_2")])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": sums["batches.meta"]})


def test_download(tmp_path: Path, served: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small_cifar(tmp_path / "www", served, monkeypatch)
    options = {"name": "cifar10", "root": str(tmp_path / "data"), "val_fraction": 0.5}
    data = ready(**options)
    assert batches(data, data.train_dataloader())["label"].tolist().count(3) == 1
    assert data.source.load("test").images.unique().tolist() == [30]  # type: ignore[union-attr]

    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/gone")
    ready(**options)  # what is there is not fetched again


def test_download_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    with pytest.raises(UserError, match=mentions("cifar10", "cifar-10-python.tar.gz")):
        ready(name="cifar10", root=str(tmp_path / "data"))


def test_class_names_need_no_download(tmp_path: Path) -> None:
    counts = {
        name: ImageData(name, root=str(tmp_path)).num_classes for name in ("cifar10", "cifar100", "stl10", "mnist")
    }
    assert counts == {"cifar10": 10, "cifar100": 100, "stl10": 10, "mnist": 10}


# -- bad input


def test_missing_empty_and_one_class(tmp_path: Path, image_tree: Tree) -> None:
    (tmp_path / "empty").mkdir()
    for root, sentence in (
        (tmp_path / "nowhere", "does not exist"),
        (tmp_path / "empty", "has no class folders"),
        (image_tree({"only": (8, 8)}), "has no two classes, only 'only'"),
        (tmp_path / "pictures/only/0.png", "is a file"),
    ):
        with pytest.raises(UserError, match=mentions("data.root", root, sentence)):
            ImageData(root=str(root))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "cifar1O"}, ["data.name", "'cifar1O'", "'cifar10'"]),
        ({"crop_scale": (0.0, 1.0)}, ["data.crop_scale", "[0.0, 1.0]"]),
        ({"crop_scale": (0.9, 0.5)}, ["data.crop_scale", "[0.9, 0.5]"]),
        ({"test_crop_pct": 0.0}, ["data.test_crop_pct", "0.0"]),
        ({"crop_mode": "centre"}, ["data.crop_mode", "'centre'", "'center'"]),
        ({"num_workers": -1}, ["data.num_workers", "-1"]),
    ],
)
def test_arguments_out_of_range(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError, match=mentions(*words)):
        ImageData(**{"name": "digits", **options})


def test_empty_class_folder(image_tree: Tree) -> None:
    root = image_tree({"a": (8, 8), "b": (8, 8)})
    (root / "c").mkdir()
    with pytest.raises(UserError, match=mentions(root / "c", "images")):
        ready(root=str(root))


def test_class_of_test_that_train_lacks(image_tree: Tree) -> None:
    root = image_tree({"train/ant": (8, 8), "train/bee": (8, 8), "test/ants": (8, 8)})
    with pytest.raises(UserError, match=mentions("'ants'", "'ant'")):
        ready("test", root=str(root))


def test_split_too_small(image_tree: Tree) -> None:
    root = image_tree({"a": (8, 8), "b": (8, 8)}, count=3)
    with pytest.raises(UserError, match=mentions("data.val_fraction", "0.01", "6")):
        ready(root=str(root), val_fraction=0.01)


@pytest.mark.parametrize(
    ("stage", "predict_root", "downloads"), [("predict", "photos", 0), ("predict", None, 1), ("test", "photos", 1)]
)
def test_own_pictures_are_predicted_without_the_data_of_the_training(
    stage: str, predict_root: str | None, downloads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, asked = ImageData("mnist", str(tmp_path), predict_root=predict_root), list[int]()
    monkeypatch.setattr(data.source, "prepare", lambda: asked.append(1))
    attach(data, state=SimpleNamespace(fn=stage)).prepare_data()
    assert len(asked) == downloads


def test_own_pictures_are_predicted_with_the_classes_alone(image_tree: Tree, tmp_path: Path) -> None:
    root = image_tree({"any": (9, 9)}, count=2)
    own = {"root": str(tmp_path / "gone"), "class_names": ["x", "y", "z"]}
    data = ready("predict", **own, predict_root=str(root))
    assert (data.num_classes, data.class_names) == (3, ["x", "y", "z"])
    assert batches(data, data.predict_dataloader())["image"].shape == (2, 3, 16, 16)
    for stage, words in {
        "fit": ["data.class_names", "train"],
        "test": ["labelled test split"],
        "predict": ["data.predict_root"],
    }.items():
        with pytest.raises(UserError, match=mentions(*words)):
            ready(stage, **own)


def test_photos_are_turned_upright(tmp_path: Path) -> None:
    """A camera held on its side writes its pixels as they lie, and how to turn them."""
    pixels = np.arange(6 * 4 * 3, dtype=np.uint8).reshape(6, 4, 3) * 3
    exif = Image.Exif()
    for orientation, written in {1: pixels, 6: np.rot90(pixels), 3: pixels[::-1, ::-1], 2: pixels[:, ::-1]}.items():
        exif[ExifTags.Base.Orientation] = orientation
        Image.fromarray(np.ascontiguousarray(written)).save(tmp_path / "photo.png", exif=exif)
        seen = picture_files(tmp_path, "data.predict_root").images
        assert isinstance(seen, Files)
        assert seen.decode(0, lambda image: image.size) == (4, 6)
        assert np.array_equal(seen.decode(0, np.asarray), pixels)


def test_a_photo_with_broken_exif_data_is_read(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation], exif[ExifTags.Base.ImageDescription] = 6, "red"
    description = ExifTags.Base.ImageDescription.to_bytes(2, "big")
    broken = exif.tobytes().replace(description, b"\1\0")  # a text where a number is to be
    Image.new("RGB", (6, 4), "red").save(tmp_path / "photo.jpg", exif=broken)
    seen = picture_files(tmp_path, "data.predict_root").images
    assert isinstance(seen, Files)
    assert seen.decode(0, lambda image: image.size) == (4, 6)


@pytest.mark.parametrize("turned", [1, 6])
@pytest.mark.parametrize("kind", ["jpg", "png", "gif", "tiff"])
def test_a_picture_that_is_broken_in_the_middle_is_refused(kind: str, turned: int, tmp_path: Path) -> None:
    """PIL raises for broken pixels once, and gives the half-filled picture when it is asked again."""
    pixels = np.random.default_rng(0).integers(0, 256, (150, 150, 3), np.uint8)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = turned
    options = {"compression": "tiff_lzw"} if kind == "tiff" else {}
    file = tmp_path / f"photo.{kind}"
    Image.fromarray(pixels).save(file, **({"exif": exif} if kind in ("jpg", "png") else {}), **options)
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 200] = bytes(255 - byte for byte in content[middle : middle + 200])
    file.write_bytes(content)
    with pytest.raises(UserError, match=mentions(str(file), "cannot be read")):
        Files([file]).decode(0, to_rgb)


def test_a_large_photo_is_read_smaller(tmp_path: Path) -> None:
    Image.new("RGB", (1600, 1200), "red").save(tmp_path / "photo.jpg")
    transform = ImageTransform((64, 64), (0.5,) * 3, (0.5,) * 3, "bicubic")
    sizes: list[tuple[int, int]] = []
    Files([tmp_path / "photo.jpg"]).decode(0, lambda image: (transform.test_one(image), sizes.append(image.size)))
    assert sizes == [(200, 150)]


def test_heads_are_looked_at_without_their_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten thousand PNG files are looked at before training, and PIL reads a PNG's pixels to know its EXIF data."""
    Image.new("RGB", (4, 6), "red").save(tmp_path / "photo.png")
    seen = picture_files(tmp_path, "data.predict_root").images
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("pixels were read"))
    assert isinstance(seen, Files)
    seen.look(0, check_mode)


def test_a_picture_that_may_not_be_read_is_not_called_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path, **_: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Image, "open", refused)
    with pytest.raises(UserError, match=mentions("a.png", "Permission denied")):
        Files([tmp_path / "a.png"]).decode(0, to_rgb)


def test_predict_root_missing_or_empty(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=mentions("data.predict_root", "none'", "exist")):
        ready("predict", name="digits", predict_root=str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=mentions("data.predict_root", "empty'", "images")):
        ready("predict", name="digits", predict_root=str(tmp_path / "empty"))


@pytest.mark.parametrize("kind", ["truncated", "text", "float"])
def test_bad_small_image_is_named_before_training(image_tree: Tree, kind: str) -> None:
    root = image_tree({"a": (12, 12), "b": (12, 12)})
    bad = spoil(root / "b" / "3.png", kind)
    with pytest.raises(UserError, match=mentions(bad)) as caught:
        ready(root=str(root))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_truncated_large_image_is_named_at_first_sight(image_tree: Tree, workers: int) -> None:
    root = image_tree({"a": (150, 140), "b": (150, 140)})
    bad = spoil(root / "b" / "3.png", "truncated")
    data = ready(root=str(root), num_workers=workers, val_fraction=0.0)
    with pytest.raises(UserError, match=mentions(bad, "cannot be read")) as caught:
        list(data.train_dataloader())
    assert "\n" not in str(caught.value)


def test_wrong_mode_of_a_large_image_is_named_before_training(image_tree: Tree) -> None:
    root = image_tree({"a": (150, 140), "b": (150, 140)})
    bad = spoil(root / "b" / "3.png", "float")
    with pytest.raises(UserError, match=mentions(bad, "'F'", "mode")):
        ready(root=str(root))


def spoil(path: Path, kind: str) -> Path:
    """Replace an image with something that is none; returns its path."""
    if kind == "truncated":
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
    elif kind == "text":
        path.write_text("not an image")
    else:
        path.unlink()
        path = path.with_suffix(".tiff")
        Image.new("F", (12, 12)).save(path)
    return path


def test_what_is_left_out_is_counted_and_said(image_tree: Tree) -> None:
    root = image_tree({"cat": (20, 24), "dog": (24, 20)})
    for name in ("cat/a.GIF", "dog/b.HEIC", "dog/c.heic", "dog/notes.txt", "dog/.c.gif", "dog/raw"):
        (root / name).write_bytes(b"x")
    kinds = {".gif": 1, ".heic": 2, ".txt": 1, "hidden": 1, "without an ending": 1}
    for options in ({"root": str(root)}, {"name": "digits", "predict_root": str(root)}):
        data = ready("predict" if "name" in options else "fit", **options)
        assert data.left_out == kinds
        assert data.description().endswith("; left out: 2 .heic, 1 .gif, 1 hidden, 1 .txt, 1 without an ending")
        data.setup("predict" if "name" in options else "fit")
        assert data.left_out == kinds  # the same files, counted once


def test_pictures_that_came_later_are_predicted(image_tree: Tree) -> None:
    root = image_tree({"first": (9, 9)}, count=2)
    data = ready("predict", name="digits", predict_root=str(root))
    image_tree({"second": (9, 9)}, count=3)
    data.setup("predict")
    assert len(data.predict_set) == 5  # type: ignore[arg-type]


def test_one_picture_in_every_class(image_tree: Tree) -> None:
    root = str(image_tree({"a": (8, 8), "b": (8, 8), "c": (8, 8)}, count=1))
    for fraction in (0.4, 0.9):
        with pytest.raises(UserError, match=mentions("val_fraction", fraction, "training images")):
            ready(root=root, val_fraction=fraction, batch_size=2)
    assert len(ready(root=root, val_fraction=0.0, batch_size=2).train_set) == 3  # type: ignore[arg-type]


def test_model_without_data_config() -> None:
    data = attach(ImageData("digits"))
    del data.trainer.lightning_module.data_config
    with pytest.raises(UserError, match="data_config"):
        data.setup("fit")


@pytest.mark.parametrize(
    ("name", "file"), [("stl10", "stl10_binary.tar.gz"), ("mnist", "MNIST/raw/train-images-idx3-ubyte.gz")]
)
def test_a_download_that_broke_off_is_named(name: str, file: str, tmp_path: Path, monkeypatch: Any) -> None:
    def no_network(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(f"torchvision.datasets.{name}.download_and_extract_archive", no_network)
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_bytes(b"half")
    with pytest.raises(UserError, match=mentions(name, "no network", f"remove '{tmp_path / file}'")):
        ImageData(name, root=str(tmp_path)).prepare_data()
    (tmp_path / file).unlink()
    with pytest.raises(UserError) as refused:
        ImageData(name, root=str(tmp_path)).prepare_data()
    assert "remove" not in str(refused.value)


@pytest.mark.parametrize("splits", [("train", "val"), ("train", "val", "test")])
def test_without_a_test_folder_it_is_said_that_nothing_is_tested(
    splits: tuple[str, ...], tmp_path: Path, image_tree: Tree, capsys: Any
) -> None:
    root = image_tree({f"{split}/{name}": (9, 9) for split in splits for name in "ab"}, count=3)
    ready(root=str(root), batch_size=2)
    assert ("; nothing is tested, as there is no labelled test split\n" in capsys.readouterr().out) == (
        len(splits) == 2
    )


# -- the real ones


@pytest.mark.real
@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared")
def test_real_mnist() -> None:
    data = ready("test", name="mnist", root=str(SHARED / "data" / "mnist"))
    test = data.source.load("test")
    assert test.images.shape == (10_000, 1, 28, 28)  # type: ignore[union-attr]
    assert test.labels[:5].tolist() == [7, 2, 1, 0, 4]  # type: ignore[index]
    batch = data.on_after_batch_transfer(next(iter(data.test_dataloader())), 0)
    assert batch["image"].shape == (4, 3, 16, 16)


@pytest.mark.real
@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared")
def test_real_cifar100() -> None:
    root = str(SHARED / "data" / "cifar100")
    data = ImageData(root=root, image_column="img", label_column="fine_label")
    assert data.class_names == ImageData("cifar100", root="unused").class_names
    test = data.source.load("test")
    assert test.labels.bincount().tolist() == [100] * 100  # type: ignore[union-attr]
    with test.images.open(0) as image:  # type: ignore[union-attr]
        assert (image.size, image.mode) == ((32, 32), "RGB")
