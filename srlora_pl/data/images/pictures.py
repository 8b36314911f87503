"""Encoded images, and those of a split: opened one by one, or all in memory."""

import contextlib
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor

from srlora_pl.data.images.transforms import check_mode, to_rgb
from srlora_pl.util.errors import UserError

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
        except (FileNotFoundError, PermissionError) as error:
            name, file = self.name(index), str(error.filename)
            what = f"The image {name}" if name == file else f"The file '{file}' of the image {name}"
            if isinstance(error, PermissionError):
                raise UserError(f"{what} may not be read ({error.strerror}); change its permissions.") from None
            raise UserError(f"{what} is not there any more; put it back.") from None
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


@dataclass
class Split:
    """Images of one split, uint8 (n, c, h, w) or still encoded; their classes, int64 (n,); what each is called.

    ``left_out``: what lies beside the images and is not used, by its kind, and how often.
    """

    images: Tensor | Pictures
    labels: Tensor | None
    name: Callable[[int], str] = str
    left_out: Counter[str] = field(default_factory=Counter)


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
