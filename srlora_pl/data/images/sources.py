"""Sources of images: the shipped digits, torchvision's data sets, and the one that a config asks for."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torchvision.datasets import CIFAR10, CIFAR100, MNIST, STL10
from torchvision.datasets.utils import check_integrity

from srlora_pl.data.images.folders import Folder
from srlora_pl.data.images.hub import Hub, is_table
from srlora_pl.data.images.pictures import Source, Split
from srlora_pl.util.errors import UserError, listed, one_line, require_one_of
from srlora_pl.util.files import is_hub_name


class NamesOnly(Source):
    """No data, only the classes of a trained model that predicts the user's own pictures."""

    splits = ()

    def __init__(self, class_names: list[str]) -> None:
        self.class_names = class_names

    def load(self, split: str) -> Split:
        raise UserError(
            f"data.class_names stands for the data of a trained model, and there is no {split} split: leave it out."
        )


_TEN_DIGITS = [str(digit) for digit in range(10)]


class Digits(Source):
    """The UCI handwritten digits, 8x8 (see ``assets/digits/README.md``), with a fixed test split of 360."""

    class_names = _TEN_DIGITS

    def load(self, split: str) -> Split:
        with as_file(files("srlora_pl") / "assets" / "digits" / "digits.safetensors") as path:
            table = load_file(path)
        rows = table["test"] == (split == "test")
        grey = (table["images"][rows].float() * (255 / 16)).round().to(torch.uint8)
        return Split(grey[:, None], table["labels"][rows].long())


@dataclass(frozen=True)
class _Known:
    kind: Callable[..., Any]
    files: str  # the files to put into place by hand if they cannot be downloaded
    class_names: list[str]


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
    "cifar10": _Known(CIFAR10, f"{CIFAR10.url} into {{root}}", _CIFAR10.split()),
    "cifar100": _Known(CIFAR100, f"{CIFAR100.url} into {{root}}", _CIFAR100.split()),
    "mnist": _Known(MNIST, f"the four files *-ubyte.gz of {MNIST.mirrors[0]} into {{root}}/MNIST/raw", _TEN_DIGITS),
    "stl10": _Known(STL10, f"{STL10.url} into {{root}}", _STL10.split()),
}
NAMES = ("digits", *TORCHVISION)
# Checksums that torchvision has only of the packed files.
_UNPACKED_MNIST = {
    "MNIST/raw/train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "MNIST/raw/train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "MNIST/raw/t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "MNIST/raw/t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


class Torchvision(Source):
    """A data set that torchvision can download."""

    def __init__(self, name: str, root: str) -> None:
        self.name, self.root = name, root
        self.known = TORCHVISION[name]
        self.class_names = self.known.class_names
        self._prepared: Any = None

    def prepare(self) -> None:
        # Kept for `load`: torchvision reads whole files to check them, gigabytes for STL-10.
        self._prepared = self._build("train", download=True)

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
        part = {"split": split} if self.name == "stl10" else {"train": split == "train"}
        try:
            return self.known.kind(self.root, download=download, **part)
        except (OSError, RuntimeError, ValueError, AssertionError, EOFError, UnpicklingError) as error:
            # PyTorch's own advice on such a file is to let it run code.
            reason = "a file holds more than tensors" if isinstance(error, UnpicklingError) else one_line(error)
            broken = listed(f"'{path}'" for path in self._broken_files())
            remedy = f"remove {broken}, where a download may have broken off, and " if broken else ""
            raise UserError(
                f"{self.name} is not whole under data.root '{self.root}' and could not be downloaded ({reason}); "
                f"{remedy}put {self.known.files.format(root=self.root)}, and it is unpacked there."
            ) from None

    def _broken_files(self) -> list[Path]:
        """The files that are there with another content than torchvision's checksums say."""
        kind: Any = self.known.kind
        if self.name == "mnist":
            sums = {f"MNIST/raw/{name}": md5 for name, md5 in kind.resources} | _UNPACKED_MNIST
        else:
            sums = {f"{kind.base_folder}/{name}": md5 for name, md5 in kind.train_list + kind.test_list}
            sums[kind.filename] = kind.tgz_md5
        there = {path: md5 for name, md5 in sums.items() if (path := Path(self.root, name)).is_file()}
        return [path for path, md5 in there.items() if not check_integrity(path, md5)]


def find_source(name: str | None, root: str, image_column: str, label_column: str) -> Source:
    """The source that a config's ``data.name`` and ``data.root`` mean."""
    if name is not None:
        require_one_of("data.name", name, NAMES)
        return Digits() if name == "digits" else Torchvision(name, root)
    path = Path(root)
    if path.is_dir():
        if is_table(path, label_column):
            return Hub(root, image_column, label_column)
        if below := sorted(path.glob("*/dataset_dict.json")):
            raise UserError(f"data.root '{root}' holds a data set in a folder of its own; give '{below[0].parent}'.")
        return Folder(path)
    if path.exists():
        raise UserError(f"data.root '{root}' is a file; give the folder that holds the images.")
    if is_hub_name(root):
        return Hub(root, image_column, label_column)
    raise UserError(
        f"data.root '{root}' does not exist; give a folder with one folder of images per class, or set data.name "
        f"to one of {listed(NAMES)}."
    )
