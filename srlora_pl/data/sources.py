"""Where images come from: each source knows its classes at once and hands out its splits when asked.

Names of splits are ``train``, ``val`` and ``test``. A source reads no pixels in ``__init__``.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import as_file, files
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol
from urllib.error import URLError

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from safetensors.torch import load_file
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100, MNIST, STL10
from torchvision.datasets.folder import IMG_EXTENSIONS

from srlora_pl.data.transforms import check_mode, to_rgb
from srlora_pl.errors import UserError, did_you_mean

MEMORY_LIMIT = 2**30  # bytes of decoded pixels that a split may hold in memory
_HEADERS = 10_000  # images whose header is looked at before training


@dataclass
class Pictures:
    """Encoded images, opened one by one; ``name(i)`` is what a person calls image i."""

    open: Callable[[int], Image.Image]
    name: Callable[[int], str]
    count: int

    def decode(self, index: int, use: Callable[[Image.Image], Any]) -> Any:
        """``use`` of image ``index``; what cannot be read is said in one sentence with the file's name."""
        try:
            with self.open(index) as image:
                return use(image)
        except UserError as error:
            raise UserError(f"Image {self.name(index)} {error}.") from None
        except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
            reason = "is not an image" if isinstance(error, UnidentifiedImageError) else f"is broken ({error})"
            raise UserError(f"Image {self.name(index)} {reason}; replace or remove it.") from None


@dataclass
class Split:
    """Images of one split, as uint8 (n, c, h, w) or still encoded, and their classes, int64 (n,)."""

    images: Tensor | Pictures
    labels: Tensor | None
    names: Callable[[int], str] = field(default=str)


class Source(Protocol):
    """What `ImageData` needs of a source."""

    class_names: list[str]

    def prepare(self) -> None:
        """Download what is missing; called in one process only."""

    def has(self, split: str) -> bool:
        """Whether there is such a split."""

    def load(self, split: str) -> Split:
        """The split's images and labels."""


# -- shipped


_TEN_DIGITS = [str(digit) for digit in range(10)]


class Digits:
    """The UCI handwritten digits, 8x8 (see ``assets/digits/README.md``), with a fixed test split of 360."""

    def __init__(self) -> None:
        self.class_names = _TEN_DIGITS

    def prepare(self) -> None:
        pass

    def has(self, split: str) -> bool:
        return split in ("train", "test")

    def load(self, split: str) -> Split:
        with as_file(files("srlora_pl") / "assets" / "digits" / "digits.safetensors") as path:
            table = load_file(path)
        rows = table["test"] == (split == "test")
        grey = (table["images"][rows].float() * (255 / 16)).round().to(torch.uint8)
        return Split(grey[:, None], table["labels"][rows].long())


# -- torchvision


@dataclass(frozen=True)
class _Known:
    build: Callable[..., Any]  # (root, split, download) -> a torchvision data set
    files: str  # what to put where, when it cannot be downloaded
    class_names: list[str]


def _by_train(kind: type) -> Callable[..., Any]:
    return lambda root, split, download: kind(root, train=split == "train", download=download)


_CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck"
_STL10 = "airplane bird car cat deer dog horse monkey ship truck"
_CIFAR100 = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate
poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider
squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
wardrobe whale willow_tree wolf woman worm
"""

TORCHVISION = {
    "cifar10": _Known(_by_train(CIFAR10), f"{CIFAR10.url} into {{root}}", _CIFAR10.split()),
    "cifar100": _Known(_by_train(CIFAR100), f"{CIFAR100.url} into {{root}}", _CIFAR100.split()),
    "mnist": _Known(
        _by_train(MNIST),
        f"the four files *-ubyte.gz of {MNIST.mirrors[0]} into {{root}}/MNIST/raw",
        _TEN_DIGITS,
    ),
    "stl10": _Known(
        lambda root, split, download: STL10(root, split=split, download=download),
        f"{STL10.url} into {{root}}",
        _STL10.split(),
    ),
}
NAMES = ("digits", *TORCHVISION)


class Torchvision:
    """One of the data sets that torchvision knows how to download."""

    def __init__(self, name: str, root: str) -> None:
        self.name, self.root = name, root
        self.known = TORCHVISION[name]
        self.class_names = self.known.class_names

    def prepare(self) -> None:
        self._build("train", download=True)

    def has(self, split: str) -> bool:
        return split in ("train", "test")

    def load(self, split: str) -> Split:
        data = self._build(split, download=False)
        images = torch.as_tensor(np.asarray(data.data))
        if images.ndim == 3:
            images = images[:, None]
        elif images.shape[-1] == 3:
            images = images.permute(0, 3, 1, 2).contiguous()
        labels = data.labels if hasattr(data, "labels") else data.targets
        return Split(images, torch.as_tensor(np.asarray(labels)).long())

    def _build(self, split: str, download: bool) -> Any:
        try:
            return self.known.build(self.root, split, download)
        except (URLError, OSError, RuntimeError, ValueError, AssertionError, EOFError) as error:
            what = self.known.files.format(root=self.root)
            raise UserError(
                f"{self.name} is not whole under data.root {self.root!r} and could not be downloaded "
                f"({_one_line(error)}); put {what}, it is unpacked there."
            ) from None


# -- the user's own folder


_VAL_NAMES = ("val", "valid", "validation")


class Folder:
    """A folder of class folders, or ``train/``, ``val/`` and ``test/`` with class folders in each.

    Without ``train/`` the whole tree is the training split. A ``test/`` of bare images has no labels.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.parts = {"train": root}
        if _class_folders(root / "train"):
            self.parts["train"] = root / "train"
            for name in ("test", *_VAL_NAMES):
                if (root / name).is_dir():
                    self.parts["val" if name in _VAL_NAMES else name] = root / name
        self.class_names = _class_folders(self.parts["train"])
        if not self.class_names:
            raise UserError(
                f"data.root '{root}' has no class folders with images; put the images of each class into a "
                f"folder of its own, under '{root}' or '{root / 'train'}'."
            )
        if len(self.class_names) < 2:
            raise UserError(
                f"data.root '{root}' has the one class {self.class_names[0]!r}; put the images of at least two "
                f"classes into '{self.parts['train']}', each into its own folder."
            )

    def prepare(self) -> None:
        pass

    def has(self, split: str) -> bool:
        return split in self.parts

    def load(self, split: str) -> Split:
        part = self.parts[split]
        found = _class_folders(part)
        if split == "test" and not found:
            return picture_files(part, "data.root")
        unknown = sorted(set(found) - set(self.class_names))
        if unknown:
            raise UserError(
                f"'{part}' has the class {unknown[0]!r}, which '{self.parts['train']}' does not have"
                f"{did_you_mean(unknown[0], self.class_names)}; rename or remove it."
            )
        paths, labels = [], []
        for label, name in enumerate(self.class_names):
            images = _images_under(part / name)
            paths += images
            labels += [label] * len(images)
            if split == "train" and not images:
                raise UserError(f"The class folder '{part / name}' holds no images; fill or remove it.")
        return Split(_pictures(paths), torch.tensor(labels), lambda index: str(paths[index]))


def picture_files(root: Path, key: str) -> Split:
    """All images under a folder, or one file, without labels; ``key`` is what a complaint names."""
    if not root.exists():
        raise UserError(f"{key} '{root}' does not exist; give a folder of images or one image file.")
    paths = [root] if root.is_file() else _images_under(root)
    if not paths:
        raise UserError(f"{key} '{root}' holds no images ({', '.join(IMG_EXTENSIONS)}).")
    return Split(_pictures(paths), None, lambda index: str(paths[index]))


def _pictures(paths: list[Path]) -> Pictures:
    return Pictures(lambda index: Image.open(paths[index]), lambda index: f"'{paths[index]}'", len(paths))


def _class_folders(root: Path) -> list[str]:
    if not root.is_dir():
        return []
    return sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _images_under(root: Path) -> list[Path]:
    return sorted(
        path
        for path in root.rglob("*")
        if path.suffix.lower() in IMG_EXTENSIONS and path.is_file() and not path.name.startswith(".")
    )


# -- a data set of the `datasets` library


class Hub:
    """A data set of ``datasets``: a local folder of its files, or a name on the hub.

    The label column holds classes by number, by name or as a ``ClassLabel``; -1 means unlabelled.
    """

    def __init__(self, root: str, image_column: str, label_column: str) -> None:
        self.root, self.image_column, self.label_column = root, image_column, label_column
        train = self._data().get("train")
        if train is None:
            raise UserError(f"The data set {root!r} has no split 'train', only {_listed(self._data())}.")
        self._check_columns(train)
        feature = train.features[label_column]
        values = sorted(set(train[label_column])) if not hasattr(feature, "names") else range(len(feature.names))
        self.values = {value: label for label, value in enumerate(values)}
        self.class_names = list(getattr(feature, "names", None) or map(str, values))
        if len(self.class_names) < 2:
            raise UserError(
                f"The data set {root!r} has the one class {self.class_names} in data.label_column "
                f"{label_column!r}; a classifier needs two or more."
            )

    def _check_columns(self, data: Any) -> None:
        for key, column in (("image_column", self.image_column), ("label_column", self.label_column)):
            if column not in data.features:
                raise UserError(
                    f"data.{key} is {column!r}, but the data set {self.root!r} has the columns "
                    f"{_listed(data.features)}{did_you_mean(column, data.features)}."
                )
        from datasets import Image as ImageFeature

        if not isinstance(data.features[self.image_column], ImageFeature):
            images = [name for name, kind in data.features.items() if isinstance(kind, ImageFeature)]
            raise UserError(
                f"data.image_column {self.image_column!r} of {self.root!r} holds no images; "
                f"its image columns are: {_listed(images) or 'none'}."
            )

    @cache  # noqa: B019 (one source a process)
    def _data(self) -> Any:
        # Imported here: it takes a second, and only these sources need it.
        from datasets import load_dataset

        try:
            return load_dataset(self.root)
        except Exception as error:
            raise UserError(
                f"data.root {self.root!r} is neither a folder here nor a data set that could be loaded from the "
                f"hub ({_one_line(error)}); give a folder, or download the data set and give its folder."
            ) from None

    def prepare(self) -> None:
        pass

    def _name(self, split: str) -> str | None:
        names = ("val", "valid", "validation", "dev") if split == "val" else (split,)
        return next((name for name in names if name in self._data()), None)

    def has(self, split: str) -> bool:
        return self._name(split) is not None

    def load(self, split: str) -> Split:
        from datasets import Image as ImageFeature

        data = self._data()[self._name(split)]
        self._check_columns(data)
        labels = self._labels(data[self.label_column], split)
        encoded = data.select_columns(self.image_column).cast_column(self.image_column, ImageFeature(decode=False))

        def read(index: int) -> Image.Image:
            cell = encoded[index][self.image_column]
            return Image.open(BytesIO(cell["bytes"]) if cell["bytes"] is not None else cell["path"])

        def name(index: int) -> str:
            return f"{index} of split {self._name(split)!r} of {self.root!r}"

        return Split(Pictures(read, name, len(data)), labels)

    def _labels(self, column: Any, split: str) -> Tensor | None:
        values = list(column)
        if split == "test" and all(value in (-1, None) for value in values):
            return None
        unknown = next((value for value in values if value not in self.values), None)
        if unknown is not None or None in values:
            raise UserError(
                f"The split {split!r} of {self.root!r} has the label {unknown!r} in column "
                f"{self.label_column!r}, which is none of the {len(self.values)} training classes."
            )
        return torch.tensor([self.values[value] for value in values])


def find_source(name: str | None, root: str, image_column: str, label_column: str) -> Source:
    """The source that a config's ``data.name`` and ``data.root`` mean."""
    if name is not None and name not in NAMES:
        raise UserError(
            f"data.name is {name!r}{did_you_mean(name, NAMES)}; it is one of {_listed(NAMES)}, or absent for a "
            f"folder of your own at data.root."
        )
    if name == "digits":
        return Digits()
    if name is not None:
        return Torchvision(name, root)
    path = Path(root)
    if path.is_dir():
        tables = any(next(path.rglob(f"*.{kind}"), None) for kind in ("parquet", "arrow", "jsonl", "csv"))
        return Hub(root, image_column, label_column) if tables else Folder(path)
    if path.exists():
        raise UserError(f"data.root '{root}' is a file; give the folder that holds the images.")
    if root.count("/") == 1 and not root.startswith((".", "/", "~")):
        return Hub(root, image_column, label_column)
    raise UserError(
        f"data.root '{root}' does not exist; give a folder with one folder of images per class, or set data.name "
        f"to one of {_listed(NAMES)}."
    )


# -- decoding


def into_memory(pictures: Pictures, limit: int = MEMORY_LIMIT) -> Tensor | None:
    """All pictures as one uint8 (n, 3, h, w), or None when they differ in size or would not fit.

    Raises:
        UserError: a picture that cannot be read or whose mode has no 8-bit form; it names the file.
    """
    first = pictures.decode(0, lambda image: image.size)
    if pictures.count * first[0] * first[1] * 3 > limit or not _same_size(pictures, first):
        return None
    pixels = np.empty((pictures.count, first[1], first[0], 3), dtype=np.uint8)

    def fill(index: int) -> bool:
        rgb = pictures.decode(index, lambda image: np.asarray(to_rgb(image)))
        fits = rgb.shape == pixels.shape[1:]
        if fits:
            pixels[index] = rgb
        return fits

    with ThreadPoolExecutor() as threads:
        if not all(threads.map(fill, range(pictures.count))):
            return None
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def _same_size(pictures: Pictures, size: tuple[int, int]) -> bool:
    """Whether images picked evenly over the split have that size; a mode that cannot be used raises."""

    def look(image: Image.Image) -> bool:
        check_mode(image)
        return image.size == size

    picked = range(0, pictures.count, max(1, pictures.count // _HEADERS))
    return all(pictures.decode(index, look) for index in picked)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _listed(names: Any) -> str:
    return ", ".join(map(str, names))
