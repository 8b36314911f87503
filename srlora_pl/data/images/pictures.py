"""Images of a split, opened one by one or all in memory, and the sources that such splits come from."""

import contextlib
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor

from srlora_pl.data.images.transforms import check_mode, to_rgb
from srlora_pl.util.errors import UserError, one_line

_T = TypeVar("_T")

# Images of one size up to this many pixels a side are kept decoded: cropping and resizing them by the batch is
# then several times faster than one by one. Larger ones are not, and are decoded in the workers.
SMALL = 128
MEMORY_LIMIT = 2**31  # bytes of decoded pixels that a split may hold
_HEADERS = 10_000  # images whose header is read before training

_BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error)


@lru_cache
def _formats() -> list[str]:
    """The formats that PIL tries one after the other, the likeliest first; not EPS, a program for Ghostscript."""
    Image.init()
    return sorted((name for name in Image.ID if name != "EPS"), key=lambda name: name not in ("JPEG", "PNG", "WEBP"))


class Pictures:
    """Encoded images, opened one by one. Instances are sent to the workers, so they can be pickled."""

    def __len__(self) -> int:
        raise NotImplementedError

    def file(self, index: int) -> Path | BytesIO:
        """The encoded image."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """The image's name in errors and predictions."""
        raise NotImplementedError

    def open(self, index: int) -> Image.Image:
        """The image, its pixels not decoded yet."""
        return Image.open(self.file(index), formats=_formats())

    def decode(self, index: int, use: Callable[[Image.Image], _T]) -> _T:
        """``use`` of one image, turned upright as its EXIF data say; errors as those of `look`."""
        return self.look(index, lambda image: use(_upright(image)))

    def look(self, index: int, use: Callable[[Image.Image], _T]) -> _T:
        """``use`` of one image as it lies in the file; no pixels are read unless ``use`` asks for them.

        Raises:
            UserError: the image cannot be read, or ``use`` refused it; the sentence names the file.
        """
        try:
            with self.open(index) as image:
                return use(image)
        except UserError as error:
            raise UserError(f"The image {self.name(index)} {error}.") from None
        except (*_BROKEN, Image.DecompressionBombError) as error:
            is_image = not isinstance(error, UnidentifiedImageError)
            reason = f"cannot be read ({one_line(error)})" if is_image else "is not an image"
            raise UserError(
                f"The image {self.name(index)} {reason}; replace it to go on with a run, or remove it for a new one."
            ) from None


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF data say; unreadable EXIF data are passed over, broken pixels are not."""
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


@dataclass
class Split:
    """The images of one split, uint8 (n, c, h, w) or still encoded; their classes, int64 (n,); their names.

    ``left_out``: how many files and folders beside the images are not used, by their kind.
    """

    images: Tensor | Pictures
    labels: Tensor | None
    name: Callable[[int], str] = str
    left_out: Counter[str] = field(default_factory=Counter)


class Source:
    """Where images come from.

    Attributes:
        class_names: known at once.
        splits: those of ``train``, ``val`` and ``test`` that there are; no pixels are read before `load`.
    """

    class_names: list[str]
    splits: Container[str] = ("train", "test")

    def prepare(self) -> None:
        """Download what is missing; called in one process only."""

    def has_labels(self, split: str) -> bool:
        """Whether there is such a split and it can be scored on."""
        return split in self.splits

    def load(self, split: str) -> Split:
        """The split's images and labels."""
        raise NotImplementedError


def into_memory(pictures: Pictures) -> Tensor | Pictures:
    """Small pictures of one size as one uint8 (n, 3, h, w); others as they are, their modes checked.

    Raises:
        UserError: a picture cannot be read or its mode has no 8-bit form; the sentence names the file.
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
    """All pictures, uint8 (n, 3, height, width), or None if one has another size."""
    pixels = np.empty((len(pictures), 3, height, width), dtype=np.uint8)
    for index in range(len(pictures)):
        rgb = pictures.decode(index, lambda image: np.asarray(to_rgb(image))).transpose(2, 0, 1)
        if rgb.shape != pixels.shape[1:]:
            return None
        pixels[index] = rgb
    return torch.from_numpy(pixels)
