"""Crop, resize, flip and normalise whole batches of uint8 images on any device, as PIL does one by one.

A resize is linear in each axis, so the crop, resize and flip of an image are two matrix products, one per axis, with
matrices of its own. As in PIL the first result is rounded to whole grey levels before the second product, and the order
of the two follows from the sizes (`vertical_first`). Few pixels differ from PIL's, and by one grey level: halfway
between two levels float32 may round to the other.

Not every device has float64, so crops and filter weights are computed on the CPU, and the device only multiplies.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, floor, log
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from srlora_pl.util.errors import UserError, require_one_of
from srlora_pl.util.precision import full_precision
from srlora_pl.util.randomness import derive, run_seed, uniform

_AUGMENT = int.from_bytes(b"augment")
_RATIO = (3 / 4, 4 / 3)  # of width to height, torchvision's RandomResizedCrop
_TRIES = 10
Array = npt.NDArray[np.float64]


def _triangle(t: Array) -> Array:
    return np.maximum(1 - abs(t), 0)


def _cubic(t: Array, a: float = -0.5) -> Array:
    """Keys' cubic (1981), with PIL's a."""
    t = np.minimum(abs(t), 2)
    near = ((a + 2) * t - (a + 3)) * t * t + 1
    far = (((t - 5) * t + 8) * t - 4) * a
    return np.where(t < 1, near, far)


class _Filter(NamedTuple):
    weight: Callable[[Array], Array]
    support: float
    pil: Image.Resampling


_FILTERS = {
    "bilinear": _Filter(_triangle, 1.0, Image.Resampling.BILINEAR),
    "bicubic": _Filter(_cubic, 2.0, Image.Resampling.BICUBIC),
}


class Boxes(NamedTuple):
    """One crop per sample, in whole pixels, each int64 (b,); where ``flip`` is 1 it is mirrored left to right."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor
    flip: Tensor


def random_boxes(numbers: Tensor, height: int, width: int, scale: tuple[float, float], hflip: bool) -> Boxes:
    """The crops of torchvision's RandomResizedCrop, with random flips.

    ``numbers``: uniform in [0, 1), float64 (b, `DRAWS`). Ten tries of (area, aspect ratio) are made at once, and the
    first that fits the image counts. If none fits, the crop is the central one of the nearest allowed ratio.
    """
    area = height * width * (scale[0] + (scale[1] - scale[0]) * numbers[:, :_TRIES])
    low, high = log(_RATIO[0]), log(_RATIO[1])
    ratio = (low + (high - low) * numbers[:, _TRIES : 2 * _TRIES]).exp()
    w, h = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)

    # The fallback follows the tries, so that it is the first that fits if they do not.
    fallback_h, fallback_w = _central(height, width)
    fits = torch.cat([fits, torch.ones_like(fits[:, :1])], 1)
    h = torch.cat([h, torch.full_like(h[:, :1], fallback_h)], 1)
    w = torch.cat([w, torch.full_like(w[:, :1], fallback_w)], 1)
    first = fits.to(torch.uint8).argmax(1, keepdim=True)
    h, w = h.gather(1, first)[:, 0], w.gather(1, first)[:, 0]

    central = first[:, 0] == _TRIES
    top = torch.where(central, (height - h) // 2, (numbers[:, -3] * (height - h + 1)).long())
    left = torch.where(central, (width - w) // 2, (numbers[:, -2] * (width - w + 1)).long())
    flip = (numbers[:, -1] < 0.5).long() if hflip else torch.zeros_like(top)
    return Boxes(top, left, h, w, flip)


DRAWS = 2 * _TRIES + 3


def _central(height: int, width: int) -> tuple[int, int]:
    if width / height < _RATIO[0]:
        return round(width / _RATIO[0]), width
    if width / height > _RATIO[1]:
        return height, round(height * _RATIO[1])
    return height, width


def axis_weights(start: Tensor, length: Tensor, full: int, size: int, kind: str, flip: Tensor | None = None) -> Tensor:
    """The weight of each input pixel in each output pixel along one axis, as in PIL's antialiased resize.

    ``start``, ``length``: the crop of each sample, int64 (b,); ``full``: input pixels; ``size``: output pixels.
    Returns float32 (b, size, full).
    """
    first, weight = _taps(full, size, kind, start.device)
    out = torch.arange(size, device=start.device).expand(len(start), size)
    if flip is not None:
        out = torch.where(flip[:, None] > 0, size - 1 - out, out)
    row = length[:, None] - 1
    place = (start[:, None] + first[row, out])[..., None] + torch.arange(weight.shape[-1], device=start.device)
    return weight.new_zeros(len(start), size, full).scatter_add_(-1, place.clamp_(0, full - 1), weight[row, out])


@lru_cache
def _taps(full: int, size: int, kind: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """The weights of `axis_weights` for crops of 1 to ``full`` pixels, computed once and cached on ``device``.

    Returns the first pixel within the filter's reach, int64 (full, size), and the weights of this and the following
    pixels, float32 (full, size, taps), computed in float64 and rounded to 22 binary places as PIL does.
    """
    filter_ = _FILTERS[kind]
    length = np.arange(1, full + 1)[:, None]
    scale = length / size
    stretch = np.maximum(scale, 1)  # a downscale widens the filter: that is the antialiasing
    center = (np.arange(size) + 0.5) * scale
    first = np.floor(center - filter_.support * stretch).astype(np.int64)
    pixel = first[..., None] + np.arange(2 * ceil(filter_.support * max(1, full / size)) + 1)
    weight = filter_.weight((pixel + 0.5 - center[..., None]) / stretch[..., None])
    weight *= (pixel >= 0) & (pixel < length[..., None])
    weight /= weight.sum(-1, keepdims=True)
    weight = (np.round(weight * 2**22) * 2.0**-22).astype(np.float32)  # exact
    return torch.from_numpy(first).to(device), torch.from_numpy(weight).to(device)


def vertical_first(height: Any, width: Any, size: tuple[int, int]) -> Any:
    """Whether a crop (ints, or int tensors of many) is resized by columns before rows: Pillow 13's rule.

    Older versions always begin with the rows. `ImageTransform` does both passes itself, so its pixels are the same with
    any Pillow.
    """
    shrink = height - size[0]
    return (shrink > 0) & (shrink > 2 * (width - size[1]))


def resize(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Resize uint8 images (b, c, h, w) by their axes' weights (b, H, h) and (b, W, w), horizontally first.

    Returns whole grey levels as float32, (b, c, H, W).
    """
    b, c, h, w = images.shape
    x = _exact_levels(images.reshape(b, c * h, w).float(), columns)
    x = torch.bmm(rows.repeat_interleave(c, 0), x.view(b * c, h, -1)).add_(0.5).floor_().clamp_(0, 255)
    return x.view(b, c, *x.shape[1:])


def _exact_levels(pixels: Tensor, weights: Tensor) -> Tensor:
    """``pixels`` (b, n, full) resized with ``weights`` (b, size, full): grey levels (b, n, size), exactly PIL's.

    An exact first pass keeps the rounding errors of both from adding up to two levels. A weight has 22 binary places, a
    pixel 8, and float32 holds 24 in all, so the products with each half of a weight are exact.
    """
    upper = weights.mul(2**11).round_().mul_(2**-11)
    level = torch.bmm(pixels, upper.mT).add_(0.5)
    rest = level.frac()
    level.sub_(rest)
    rest.baddbmm_(pixels, (weights - upper).mT)
    return level.add_(rest.floor_()).clamp_(0, 255)


def resize_vertically_first(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """`resize` with the passes in the other order."""
    return resize(images.transpose(2, 3), columns, rows).transpose(2, 3)


@dataclass(frozen=True)
class ImageTransform:
    """From uint8 images to a model's input, for training and for evaluation.

    Attributes:
        size: (height, width) in pixels of the model's input.
        mean, std: per RGB channel, of images in [0, 1].
        interpolation: ``bilinear`` or ``bicubic``.
        crop_scale: smallest and largest share of an image's area that a training crop keeps.
        hflip: mirror half of the training images left to right.
        test_crop_pct: evaluation resizes to size / test_crop_pct and keeps the middle.
        crop_mode: how it resizes: ``squash`` each side by itself, so that with 1.0 all of an image is kept, and its
            ratio is not; ``center`` both by one factor, until the shorter one fits.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_scale: tuple[float, float] = (0.08, 1.0)
    hflip: bool = True
    test_crop_pct: float = 1.0
    crop_mode: str = "squash"

    @classmethod
    def for_model(cls, config: dict[str, Any], test_crop_pct: float | None = 1.0, **options: Any) -> "ImageTransform":
        """The transform for a model's data config (as timm's ``resolve_model_data_config`` gives it).

        Args:
            config: of the model.
            test_crop_pct: None takes the model's own ``crop_pct``.
            options: the other attributes.

        Raises:
            UserError: the config has no ``crop_pct`` to take, or its ``interpolation`` is not known here.
        """
        if test_crop_pct is None and "crop_pct" not in config:
            raise UserError("data.test_crop_pct is null, but model.data_config has no crop_pct: give a number.")
        pct = config["crop_pct"] if test_crop_pct is None else test_crop_pct
        require_one_of("interpolation in model.data_config", config["interpolation"], _FILTERS)
        _, height, width = config["input_size"]
        mean, std = tuple(config["mean"]), tuple(config["std"])
        return cls((height, width), mean, std, config["interpolation"], test_crop_pct=pct, **options)

    # -- whole batches, in full precision whatever the model's precision

    @full_precision()
    def train(self, images: Tensor, crops: Tensor) -> Tensor:
        """Uint8 images (b, c, h, w), cropped, resized and flipped as ``crops`` say: grey levels, (b, c, H, W)."""
        _, _, height, width = images.shape
        boxes = Boxes(*crops)
        rows = axis_weights(boxes.top, boxes.height, height, self.size[0], self.interpolation)
        columns = axis_weights(boxes.left, boxes.width, width, self.size[1], self.interpolation, boxes.flip)
        out = resize(images, rows, columns)
        if height <= self.size[0]:
            return out  # no crop can be taller than its output
        other = vertical_first(boxes.height, boxes.width, self.size)[:, None, None, None]
        return torch.where(other, resize_vertically_first(images, rows, columns), out)

    @full_precision()
    def test(self, images: Tensor) -> Tensor:
        """Uint8 images (b, c, h, w) resized, and their middle kept: grey levels, (b, c, H, W)."""
        height, width = images.shape[2:]
        big = self._test_size(height, width)
        sides = zip((height, width), big, self.size, strict=True)
        rows, columns = (self._middle(*side, images) for side in sides)
        columns_first = vertical_first(height, width, big)
        return (resize_vertically_first if columns_first else resize)(images, rows, columns)

    def _middle(self, full: int, big: int, size: int, images: Tensor) -> Tensor:
        whole = torch.full((1,), full, device=images.device)
        weights = axis_weights(torch.zeros_like(whole), whole, full, big, self.interpolation)
        return weights.narrow(1, _margin(big, size), size).expand(len(images), -1, -1)

    def _test_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) that an image is resized to before its middle is kept, rounded as timm and torchvision do."""
        least = [floor(size / self.test_crop_pct) for size in self.size]
        if self.crop_mode == "squash":
            return least[0], least[1]
        if least[0] == least[1]:
            longer = int(least[0] * max(height, width) / min(height, width))
            return (longer, least[1]) if height > width else (least[0], longer)
        ratio = min(height / least[0], width / least[1])
        return round(height / ratio), round(width / ratio)

    def normalise(self, images: Tensor) -> Tensor:
        """Grey levels 0 to 255, (b, c, H, W), as float32 RGB input, (b, 3, H, W); floats are changed in place."""
        mean, std = _levels(self.mean, images.device), _levels(self.std, images.device)
        levels = images.float()
        levels = levels.sub_(mean) if levels.shape[1] == 3 else levels - mean
        return levels.div_(std)

    # -- random crops, on the CPU

    def crops(self, keys: Tensor, height: int, width: int) -> Tensor:
        """`Boxes` of the samples ``keys``, whose images have one size, as one tensor: int64 (5, b)."""
        return torch.stack(random_boxes(self.numbers(keys), height, width, self.crop_scale, self.hflip))

    def numbers(self, keys: Tensor) -> Tensor:
        """The random numbers for the augmentation of the samples ``keys``: a function of (run seed, epoch, index).

        ``keys``: (epoch, index), int64 (b, 2). Returns float64 (b, `DRAWS`), uniform in [0, 1).
        """
        return uniform(derive(run_seed(), _AUGMENT), keys, DRAWS)

    # -- one image, in a worker: the same crops and, for images that draft() leaves alone, the same pixels

    def train_one(self, image: Image.Image, numbers: Tensor) -> Tensor:
        """One augmented picture of any size, decoded here: uint8 (3, H, W); ``numbers``: its row, (1, `DRAWS`)."""
        boxes = random_boxes(numbers, image.height, image.width, self.crop_scale, self.hflip)
        top, left, height, width, flip = (int(value) for value in boxes)
        small = self._cut(image, (left, top, left + width, top + height), self.size)
        return _to_tensor(small.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else small)

    def test_one(self, image: Image.Image) -> Tensor:
        """One picture of any size, prepared for evaluation: uint8 (3, H, W)."""
        big = self._test_size(image.height, image.width)
        whole = self._cut(image, (0, 0, *image.size), big)
        top, left = map(_margin, big, self.size)
        return _to_tensor(whole.crop((left, top, left + self.size[1], top + self.size[0])))

    def _cut(self, image: Image.Image, box: tuple[int, int, int, int], size: tuple[int, int]) -> Image.Image:
        """Crop to ``box`` (left, top, right, bottom) and resize to ``size`` (height, width).

        A large JPEG is decoded at a half, a quarter or an eighth of its size, as long as the crop keeps at least twice
        the pixels per side that it is resized to: several times faster, with hardly visible differences.
        """
        width, height = image.size
        spare = min((box[2] - box[0]) / size[1], (box[3] - box[1]) / size[0]) / 2
        if spare >= 2:
            image.draft(None, (ceil(image.width / spare), ceil(image.height / spare)))
            # Both sides are rounded up, so each has a scale of its own: no crop reaches beyond the decoded pixels.
            x, y = image.width / width, image.height / height
            box = round(box[0] * x), round(box[1] * y), round(box[2] * x), round(box[3] * y)
        crop, kind = to_rgb(image).crop(box), _FILTERS[self.interpolation].pil
        columns_first = vertical_first(crop.height, crop.width, size)
        between = (crop.width, size[0]) if columns_first else (size[1], crop.height)
        return crop.resize(between, kind).resize((size[1], size[0]), kind)


def _margin(big: int, size: int) -> int:
    """Where the middle of ``big`` pixels begins, as torchvision's CenterCrop has it."""
    return round((big - size) / 2)


def check_mode(image: Image.Image) -> None:
    """Refuse pixels that have no fixed range, such as floating-point ones.

    Raises:
        UserError: its message is the end of a sentence that begins with the file's name.
    """
    if image.mode in ("I", "F", "LAB"):
        raise UserError(f"has image mode {image.mode!r}, which has no 8-bit form; convert it to RGB")


def to_rgb(image: Image.Image) -> Image.Image:
    """An 8-bit RGB copy; transparency is dropped, 16-bit grey keeps its upper 8 bits."""
    check_mode(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


@lru_cache
def _levels(channels: tuple[float, ...], device: torch.device) -> Tensor:
    """A mean or std in grey levels, (3, 1, 1), cached on the device: a copy in each step would stall the host."""
    return torch.tensor(channels, device=device)[:, None, None] * 255


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
