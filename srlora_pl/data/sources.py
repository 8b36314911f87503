"""Where images come from: each source knows its classes at once and hands out its splits when asked.

Names of splits are ``train``, ``val`` and ``test``. A source reads no pixels in ``__init__``.
"""

import contextlib
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import as_file, files
from io import BytesIO
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from safetensors.torch import load_file
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100, MNIST, STL10
from torchvision.datasets.folder import IMG_EXTENSIONS

from srlora_pl.data.base import is_hub_name
from srlora_pl.data.transforms import check_mode, to_rgb
from srlora_pl.errors import UserError, did_you_mean

_T = TypeVar("_T")

# Images of one size up to this many pixels a side are kept decoded: cropping and resizing them by the batch is
# then several times faster than one by one. Larger ones are not, and are decoded in the workers.
SMALL = 128
MEMORY_LIMIT = 2**31  # bytes of decoded pixels that a split may hold
_HEADERS = 10_000  # images whose header is looked at before training

_BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error)


class Pictures:
    """Encoded images, opened one by one. Instances go to the workers, so they can be pickled."""

    _formats: list[str] | None = None

    def __len__(self) -> int:
        raise NotImplementedError

    def file(self, index: int) -> Path | BytesIO:
        """The encoded image."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """What a person calls it."""
        raise NotImplementedError

    def open(self, index: int) -> Image.Image:
        """The image, its pixels not decoded yet."""
        if self._formats is None:
            Image.init()
            self._formats = [name for name in Image.ID if name != "EPS"]  # a program that Ghostscript would run
            # PIL asks one format after the other; the one of the first image is the likeliest.
            with Image.open(self.file(index), formats=self._formats) as first:
                self._formats.insert(0, first.format or "")
        return Image.open(self.file(index), formats=self._formats)

    def decode(self, index: int, use: Callable[[Image.Image], _T]) -> _T:
        """``use`` of one image, turned upright as its EXIF data say; errors as those of `look`."""
        return self.look(index, lambda image: use(_upright(image)))

    def look(self, index: int, use: Callable[[Image.Image], _T]) -> _T:
        """``use`` of one image as it lies in the file; as long as that is its head, no pixels are read.

        Raises:
            UserError: it cannot be read, or ``use`` refused it; the sentence has the file's name.
        """
        try:
            with self.open(index) as image:
                return use(image)
        except UserError as error:
            raise UserError(f"The image {self.name(index)} {error}.") from None
        except FileNotFoundError:
            raise UserError(f"The image {self.name(index)} is not there any more; put it back.") from None
        except (*_BROKEN, Image.DecompressionBombError) as error:
            reason = "is not an image" if isinstance(error, UnidentifiedImageError) else f"is broken ({error})"
            raise UserError(
                f"The image {self.name(index)} {reason}; replace it to go on with a run, or remove it for a new one."
            ) from None


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF data say; what cannot be read of these is passed over, broken pixels are not."""
    if not isinstance(image, JpegImageFile):  # whose EXIF data come first, so that its pixels can be read smaller yet
        image.load()
    orientation = 1
    with contextlib.suppress(*_BROKEN):
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    if orientation != 1:
        image.load()
        with contextlib.suppress(*_BROKEN):
            ImageOps.exif_transpose(image, in_place=True)
    return image


class Files(Pictures):
    """Image files."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def file(self, index: int) -> Path:
        return self.paths[index]

    def name(self, index: int) -> str:
        return str(self.paths[index])


class Cells(Pictures):
    """The image column of a data set of ``datasets``."""

    def __init__(self, table: Any, column: str, title: str) -> None:
        from datasets import Image as ImageFeature

        self.table = table.select_columns(column).cast_column(column, ImageFeature(decode=False))
        self.column, self.title = column, title

    def __len__(self) -> int:
        return len(self.table)

    def file(self, index: int) -> Path | BytesIO:
        cell = self.table.data.column(self.column)[index].as_py()  # straight from Arrow: half the time
        return Path(cell["path"]) if cell["bytes"] is None else BytesIO(cell["bytes"])

    def name(self, index: int) -> str:
        return f"{index} of {self.title}"


@dataclass
class Split:
    """Images of one split, uint8 (n, c, h, w) or still encoded; their classes, int64 (n,); what each is called."""

    images: Tensor | Pictures
    labels: Tensor | None
    name: Callable[[int], str] = str


class Source(Protocol):
    """What `ImageData` needs of a source."""

    class_names: list[str]

    def prepare(self) -> None:
        """Download what is missing; called in one process only."""

    def has(self, split: str) -> bool:
        """Whether there is such a split."""

    def has_labels(self, split: str) -> bool:
        """Whether there is such a split and it can be scored on."""

    def load(self, split: str) -> Split:
        """The split's images and labels."""


class NamesOnly:
    """No data, only the classes of a model that is to predict pictures of the user's own."""

    def __init__(self, class_names: list[str]) -> None:
        self.class_names = class_names

    def prepare(self) -> None:
        pass

    def has(self, split: str) -> bool:
        return False

    has_labels = has

    def load(self, split: str) -> Split:
        raise UserError(
            f"data.class_names stands for the data of a trained model, and there is no {split} split: leave it out."
        )


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

    has_labels = has

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
        self._prepared: Any = None

    def prepare(self) -> None:
        # Kept for `load`: torchvision reads whole files to check them, gigabytes for STL-10.
        self._prepared = self._build("train", download=True)

    def has(self, split: str) -> bool:
        return split in ("train", "test")

    has_labels = has

    def load(self, split: str) -> Split:
        data = self._prepared if split == "train" else None
        data, self._prepared = data or self._build(split, download=False), None
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
        except (OSError, RuntimeError, ValueError, AssertionError, EOFError, UnpicklingError) as error:
            what = self.known.files.format(root=self.root)
            raise UserError(
                f"{self.name} is not whole under data.root '{self.root}' and could not be downloaded "
                f"({_one_line(error)}); put {what}, and it is unpacked there."
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

    def has_labels(self, split: str) -> bool:
        return split in self.parts and bool(_class_folders(self.parts[split]))

    def load(self, split: str) -> Split:
        part = self.parts[split]
        if split == "test" and not self.has_labels(split):
            return picture_files(part, "data.root")
        unknown = sorted(set(_class_folders(part)) - set(self.class_names))
        if unknown:
            raise UserError(
                f"'{part}' has the class {unknown[0]!r}, which '{self.parts['train']}' does not have"
                f"{did_you_mean(unknown[0], self.class_names)}; rename or remove it."
            )
        others: Counter[str] = Counter()
        by_class = [_images_under(part / name, others) for name in self.class_names]
        _say_what_is_left_out(part, others)
        empty = [name for name, paths in zip(self.class_names, by_class, strict=True) if not paths]
        if empty and (split == "train" or not any(by_class)):
            raise UserError(f"The class folder '{part / empty[0]}' holds no images; fill or remove it.")
        labels = [label for label, paths in enumerate(by_class) for _ in paths]
        files = Files([path for paths in by_class for path in paths])
        return Split(files, torch.tensor(labels), files.name)


def picture_files(root: Path, key: str) -> Split:
    """All images under a folder, or one file, without labels; ``key`` is what a complaint names."""
    if not root.exists():
        raise UserError(f"{key} '{root}' does not exist; give a folder of images or one image file.")
    others: Counter[str] = Counter()
    files = Files([root] if root.is_file() else _images_under(root, others))
    _say_what_is_left_out(root, others)
    if not len(files):
        raise UserError(f"{key} '{root}' holds no images; it needs files that end in {_listed(IMG_EXTENSIONS)}.")
    return Split(files, None, files.name)


def _class_folders(root: Path) -> list[str]:
    if not root.is_dir():
        return []
    return sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _images_under(root: Path, others: Counter[str]) -> list[Path]:
    """The images that can be read; ``others`` counts the endings of all other files."""
    found = []
    for path in root.rglob("*"):
        kind = path.suffix.lower()
        if path.name.startswith(".") or not kind or not path.is_file():
            continue
        if kind in IMG_EXTENSIONS:
            found.append(path)
        else:
            others[kind] += 1
    return sorted(found)


def _say_what_is_left_out(root: Path, others: Counter[str]) -> None:
    """Of ``others``, endings and how often, those that images have."""
    images = {kind: count for kind, count in others.items() if kind in Image.registered_extensions()}
    if images:
        rank_zero_info(
            f"{sum(images.values())} files in '{root}' that end in {_listed(sorted(images))} are left out: images are "
            f"read that end in {_listed(IMG_EXTENSIONS)}."
        )


# -- a data set of the `datasets` library


class Hub:
    """A data set of ``datasets``: a local folder of its files, or a name on the hub.

    The label column holds a ``ClassLabel``, whole numbers or names; -1 means unlabelled.
    """

    def __init__(self, root: str, image_column: str, label_column: str) -> None:
        self.root, self.image_column, self.label_column = root, image_column, label_column
        self.splits = _load_dataset(root)
        if "train" not in self.splits:
            raise UserError(f"The data set {root!r} has no split 'train', only {_listed(self.splits)}.")
        train = self.splits["train"]
        self._check_columns(train)
        names = getattr(train.features[label_column], "names", None)
        values = list(range(len(names))) if names else sorted(set(train[label_column]) - {None, -1})
        self.labels = {value: label for label, value in enumerate(values)}
        self.class_names = names or [str(value) for value in values]
        if len(self.class_names) < 2:
            raise UserError(
                f"data.label_column {label_column!r} of {root!r} has only {len(self.class_names)} class; "
                f"a classifier needs two or more."
            )

    def _check_columns(self, table: Any) -> None:
        from datasets import ClassLabel
        from datasets import Image as ImageFeature

        for key, column in (("image_column", self.image_column), ("label_column", self.label_column)):
            if column not in table.features:
                raise UserError(
                    f"data.{key} is {column!r}{did_you_mean(column, table.features)}, but the columns of "
                    f"{self.root!r} are {_listed(table.features)}."
                )
        if not isinstance(table.features[self.image_column], ImageFeature):
            images = [name for name, kind in table.features.items() if isinstance(kind, ImageFeature)]
            raise UserError(
                f"data.image_column {self.image_column!r} of {self.root!r} holds no images; its columns of images "
                f"are: {_listed(images) or 'none'}."
            )
        kind = table.features[self.label_column]
        if not isinstance(kind, ClassLabel) and getattr(kind, "dtype", "").rstrip("0123456789_") not in (
            "int",
            "uint",
            "string",
            "large_string",
            "bool",
        ):
            raise UserError(
                f"data.label_column {self.label_column!r} of {self.root!r} holds {kind}, not classes; name a column "
                f"of whole numbers or names."
            )

    def prepare(self) -> None:
        pass

    def _name(self, split: str) -> str | None:
        names = (*_VAL_NAMES, "dev") if split == "val" else (split,)
        return next((name for name in names if name in self.splits), None)

    def has(self, split: str) -> bool:
        return self._name(split) is not None

    def has_labels(self, split: str) -> bool:
        name = self._name(split)
        return name is not None and not set(self.splits[name][self.label_column]) <= {None, -1}

    def load(self, split: str) -> Split:
        name = self._name(split)
        table = self.splits[name]
        self._check_columns(table)
        if not len(table):
            raise UserError(f"The split {name!r} of {self.root!r} is empty.")
        labels = None
        if split != "test" or self.has_labels(split):
            values = list(table[self.label_column])
            unknown = [value for value in values if value not in self.labels]
            if unknown:
                raise UserError(
                    f"The split {name!r} of {self.root!r} has the label {unknown[0]!r} in column "
                    f"{self.label_column!r}, which is none of the {len(self.labels)} training classes."
                )
            labels = torch.tensor([self.labels[value] for value in values])
        return Split(Cells(table, self.image_column, f"the split {name!r} of {self.root!r}"), labels)


def _load_dataset(root: str) -> Any:
    # Imported here: it takes a second, and only these sources need it.
    from datasets import load_dataset, load_from_disk

    try:
        return load_from_disk(root) if (Path(root) / "dataset_dict.json").exists() else load_dataset(root)
    except Exception as error:  # whatever its many readers raise
        raise UserError(
            f"data.root '{root}' is neither a folder of images here nor a data set that could be loaded "
            f"({_one_line(error)}); give a folder, or download the data set and give its folder."
        ) from None


def _is_table(root: Path) -> bool:
    kinds = ("*.parquet", "*.arrow", "*.jsonl")
    return any(next(root.glob(f"{where}{kind}"), None) for where in ("", "*/") for kind in kinds)


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
        return Hub(root, image_column, label_column) if _is_table(path) else Folder(path)
    if path.exists():
        raise UserError(f"data.root '{root}' is a file; give the folder that holds the images.")
    if is_hub_name(root):
        return Hub(root, image_column, label_column)
    raise UserError(
        f"data.root '{root}' does not exist; give a folder with one folder of images per class, or set data.name "
        f"to one of {_listed(NAMES)}."
    )


# -- decoding


def into_memory(pictures: Pictures) -> Tensor | Pictures:
    """Small pictures of one size as one uint8 (n, 3, h, w); others as they are, their modes checked.

    Raises:
        UserError: a picture that cannot be read or whose mode has no 8-bit form; it names the file.
    """
    width, height = pictures.decode(0, lambda image: image.size)
    if max(width, height) <= SMALL and len(pictures) * width * height * 3 <= MEMORY_LIMIT:
        pixels = _decode_alike(pictures, width, height)
        if pixels is not None:
            return pixels
    for index in range(0, len(pictures), max(1, len(pictures) // _HEADERS)):
        pictures.look(index, check_mode)
    return pictures


def _decode_alike(pictures: Pictures, width: int, height: int) -> Tensor | None:
    pixels = np.empty((len(pictures), 3, height, width), dtype=np.uint8)
    for index in range(len(pictures)):
        rgb = pictures.decode(index, lambda image: np.asarray(to_rgb(image))).transpose(2, 0, 1)
        if rgb.shape != pixels.shape[1:]:
            return None
        pixels[index] = rgb
    return torch.from_numpy(pixels)


def _one_line(error: BaseException) -> str:
    if isinstance(error, UnpicklingError):  # do not hand on its advice to let the file run code
        return "a file holds something else than tensors"
    return " ".join(str(error).split())[:200] or type(error).__name__


def _listed(names: Any) -> str:
    return ", ".join(map(str, names))
