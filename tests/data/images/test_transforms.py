"""Batched crops and resizes against PIL itself, and what they ask of a device."""

from math import floor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.transforms import RandomResizedCrop

from srlora_pl.data.images import transforms
from srlora_pl.data.images.transforms import DRAWS, ImageTransform, random_boxes, to_rgb, vertical_first
from srlora_pl.util.errors import UserError
from tests.helpers.errors import mentions

KINDS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def picture(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def pil_resize(image: Image.Image, size: tuple[int, int], kind: str) -> Image.Image:
    """PIL's own resize; Pillow < 13 lacks the rule for the order of passes, so there it is spelt out."""
    if int(Image.__version__.split(".")[0]) < 13 and vertical_first(image.height, image.width, size):
        image = image.resize((image.width, size[0]), KINDS[kind])
    return image.resize((size[1], size[0]), KINDS[kind])


def levels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def transform(size: tuple[int, int], kind: str, **options: object) -> ImageTransform:
    return ImageTransform(size, (0.5,) * 3, (0.5,) * 3, kind, **options)  # type: ignore[arg-type]


def keys(count: int, epoch: int = 0) -> Tensor:
    return torch.stack([torch.full((count,), epoch), torch.arange(count)], 1)


def train_batch(crop: ImageTransform, images: Tensor, keys: Tensor) -> Tensor:
    return crop.train(images, crop.crops(keys, *images.shape[2:]))


@pytest.mark.parametrize("train", [True, False])
def test_pixels_do_not_depend_on_the_precision_of_the_models_products(train: bool, monkeypatch) -> None:
    """Not every processor computes differently at a lower setting, so look at the setting itself."""
    seen = []
    resize = transforms.resize
    monkeypatch.setattr(
        transforms, "resize", lambda *a: seen.append(torch.get_float32_matmul_precision()) or resize(*a)
    )
    images, crop = torch.randint(0, 256, (2, 3, 20, 24)).byte(), transform((16, 16), "bicubic")
    torch.set_float32_matmul_precision("medium")
    try:
        train_batch(crop, images, keys(2)) if train else crop.test(images)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(seen) == {"highest"}


class NoFloat64(TorchDispatchMode):
    """Apple's GPUs have none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        for each in tree_leaves((args, kwargs, result)):
            assert not (isinstance(each, Tensor) and each.dtype == torch.float64), func
        return result


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", [20, 64])
def test_no_float64_is_asked_of_the_device(side: int, kind: str) -> None:
    images, crop = torch.zeros(2, 3, side, side).byte(), transform((32, 32), kind)
    crops = crop.crops(keys(2), side, side)
    with NoFloat64():
        crop.train(images, crops)
        crop.test(images)


sides = st.integers(4, 90)


@settings(deadline=None, max_examples=40)
@given(height=sides, width=sides, size=st.tuples(sides, sides), kind=st.sampled_from([*KINDS]), seed=st.integers(0, 99))
def test_random_crops_equal_pil(height: int, width: int, size: tuple[int, int], kind: str, seed: int) -> None:
    images = torch.randint(0, 256, (5, 3, height, width), generator=torch.Generator().manual_seed(seed)).byte()
    crop = transform(size, kind, crop_scale=(0.05, 1.0))
    boxes = random_boxes(crop.numbers(keys(5, seed)), height, width, crop.crop_scale, crop.hflip)

    expected = []
    for image, top, left, h, w, flip in zip(images, *(part.tolist() for part in boxes), strict=True):
        small = pil_resize(picture(image).crop((left, top, left + w, top + h)), size, kind)
        expected.append(levels(small.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else small))
    difference = (train_batch(crop, images, keys(5, seed)) - torch.stack(expected)).abs()

    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 0.1  # ties of single ratios; 0.002 on average


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(32, 32), (20, 61), (80, 33), (90, 30)])
def test_evaluation_equals_pil(kind: str, shape: tuple[int, int]) -> None:
    images = torch.randint(0, 256, (2, 3, *shape)).byte()
    plain = transform((24, 40), kind).test(images)
    assert (plain - torch.stack([levels(pil_resize(picture(i), (24, 40), kind)) for i in images])).abs().max() <= 1

    big = (floor(24 / 0.8), floor(40 / 0.8))
    left, top = round((big[1] - 40) / 2), round((big[0] - 24) / 2)
    cut = [levels(pil_resize(picture(i), big, kind).crop((left, top, left + 40, top + 24))) for i in images]
    middle = transform((24, 40), kind, test_crop_pct=0.8).test(images)
    assert (middle - torch.stack(cut)).abs().max() <= 1


@pytest.mark.parametrize("mode", ["squash", "center"])
@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
@pytest.mark.parametrize("shape", [(64, 64), (50, 31), (31, 53), (90, 30)])
def test_evaluation_is_timms_of_the_same_config(mode: str, size: tuple[int, int], shape: tuple[int, int]) -> None:
    """In the workers and in batches; 0.9 leaves margins that are no whole numbers."""
    config = {"input_size": (3, *size), "interpolation": "bicubic", "mean": (0.5,) * 3, "std": (0.5,) * 3}
    config |= {"crop_pct": 0.9, "crop_mode": mode}
    image = torch.from_numpy(np.array(Image.effect_noise(shape[::-1], 80).convert("RGB"))).permute(2, 0, 1)
    wanted = timm.data.create_transform(**config)(picture(image))
    ours = ImageTransform.for_model(config, test_crop_pct=None, crop_mode=mode)
    for levels_ in (ours.test_one(picture(image))[None], ours.test(image[None])):
        torch.testing.assert_close(ours.normalise(levels_)[0], wanted, atol=0.02, rtol=0)  # 2.5 grey levels of 255


def test_a_model_without_a_crop_of_its_own_is_named() -> None:
    config = {"input_size": (3, 8, 8), "interpolation": "bicubic", "mean": (0.5,) * 3, "std": (0.5,) * 3}
    with pytest.raises(UserError, match=mentions("data.test_crop_pct", "crop_pct", "number")):
        ImageTransform.for_model(config, test_crop_pct=None)


@pytest.mark.parametrize("kind", KINDS)
def test_worker_path_gives_the_batch_path(kind: str) -> None:
    images = torch.randint(0, 256, (8, 3, 70, 50)).byte()
    crop = transform((32, 32), kind, test_crop_pct=0.9)
    numbers = crop.numbers(keys(8)).split(1)
    one_by_one = torch.stack([crop.train_one(picture(i), n) for i, n in zip(images, numbers, strict=True)])
    assert (train_batch(crop, images, keys(8)) - one_by_one.float()).abs().max() <= 1
    one_by_one = torch.stack([crop.test_one(picture(i)) for i in images])
    assert (crop.test(images) - one_by_one.float()).abs().max() <= 1


def test_the_first_pass_equals_pil_to_the_last_bit() -> None:
    """Or the errors of both passes could add up to two grey levels. Of bicubic ones 3 : 2 has most ties."""
    images = torch.randint(0, 256, (2, 3, 24, 96), generator=torch.Generator().manual_seed(0)).byte()
    for kind in KINDS:
        for width in (24, 64, 95, 96, 144, 224):
            expected = [levels(picture(image).resize((width, 24), KINDS[kind])) for image in images]
            assert torch.equal(transform((24, width), kind).test(images), torch.stack(expected)), (kind, width)


@pytest.mark.parametrize(("kind", "share"), [("bilinear", 0.01), ("bicubic", 3e-4)])
def test_few_pixels_differ_from_pil(kind: str, share: float) -> None:
    """Those that lie between two levels, at 60 to 90 a thirtieth of the bilinear ones."""
    generator, differences = torch.Generator().manual_seed(0), []
    for size, other in ((32, 64), (96, 224), (64, 48), (28, 31), (60, 90), (80, 32)):
        images = torch.randint(0, 256, (2, 3, size, size), generator=generator).byte()
        expected = torch.stack([levels(pil_resize(picture(image), (other, other), kind)) for image in images])
        differences.append((transform((other, other), kind).test(images) - expected).abs().flatten())
    difference = torch.cat(differences)
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < share


@pytest.mark.parametrize(
    ("seed", "crops"),
    [
        ("0", [[15, 89, 38, 33, 1], [23, 22, 69, 55, 1], [33, 76, 42, 36, 0], [46, 81, 34, 39, 1]]),
        ("7", [[25, 40, 65, 58, 1], [0, 5, 91, 115, 0], [12, 38, 74, 56, 1], [42, 54, 32, 35, 1]]),
    ],
)
def test_crops_are_those_of_earlier_versions(
    seed: str, crops: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a run that began with one could not go on exactly."""
    monkeypatch.setenv("PL_GLOBAL_SEED", seed)
    some = torch.tensor([[0, 0], [0, 1], [3, 7], [2**40, 10**9]])
    assert transform((64, 64), "bicubic").crops(some, 96, 128).T.tolist() == crops


def test_augmentation_depends_on_the_key_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randint(0, 256, (6, 3, 20, 20)).byte()
    crop, all_keys = transform((16, 16), "bicubic"), keys(6, epoch=2)
    together = train_batch(crop, images, all_keys)
    order = torch.tensor([4, 1, 5])
    assert torch.equal(train_batch(crop, images[order], all_keys[order]), together[order])
    assert not torch.equal(train_batch(crop, images, keys(6, epoch=3)), together)
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert not torch.equal(train_batch(crop, images, all_keys), together)


def test_boxes_follow_torchvision() -> None:
    """Same distribution as torchvision's own crops: means of area, ratio and position over many draws."""
    n, height, width = 4000, 60, 48
    numbers = torch.rand(n, DRAWS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours = random_boxes(numbers, height, width, (0.2, 1.0), hflip=True)
    assert (ours.top >= 0).all()
    assert (ours.top + ours.height <= height).all()
    assert (ours.left >= 0).all()
    assert (ours.left + ours.width <= width).all()

    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = [RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(n)]
    for part, their in zip(ours[:4], torch.tensor(theirs).T, strict=True):
        error = 5 * their.double().std() * (2 / n) ** 0.5
        assert abs(part.double().mean() - their.double().mean()) < error
    assert abs(ours.flip.double().mean() - 0.5) < 0.04


NEARLY_1 = 1 - 2**-53


def draws(areas: list[float], ratios: list[float], top: float = 0.0, left: float = 0.0, flip: float = 0.0) -> Tensor:
    """One row of ``numbers``: areas and ratios of ten tries, the last repeated, then place and flip."""
    tries = [*areas, *areas[-1:] * (10 - len(areas)), *ratios, *ratios[-1:] * (10 - len(ratios))]
    return torch.tensor([[*tries, top, left, flip]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("numbers", "box"),
    [
        # a quarter of 1,200 x 900 pixels is 450 x 600, 519.6 x 519.6, the geometric mean of the ratios, or 600 x 450
        (draws([0.0], [0.0], 0.25, 0.75, 0.49), [150, 338, 600, 450, True]),
        (draws([0.0], [0.5], 0.0, 0.0, 0.5), [0, 0, 520, 520, False]),
        (draws([0.0], [NEARLY_1], NEARLY_1, NEARLY_1), [750, 300, 450, 600, True]),
        (draws([1 / 3], [0.5], 0.5, 0.1), [233, 16, 735, 735, True]),  # a half
    ],
)
def test_a_crop_is_what_its_numbers_say(numbers: Tensor, box: list[int]) -> None:
    assert [int(part) for part in random_boxes(numbers, 1200, 900, (0.25, 1.0), hflip=True)] == box
    assert not random_boxes(numbers, 1200, 900, (0.25, 1.0), hflip=False).flip


@pytest.mark.parametrize("earlier", [0, 3, 9])
def test_the_first_of_ten_tries_that_fits_counts(earlier: int) -> None:
    """The whole area of a strip as a square does not fit, a twentieth does, and so do the larger ones after it."""
    numbers = draws([NEARLY_1] * earlier + [0.0] + [0.02] * (9 - earlier), [0.5])
    assert [int(part) for part in random_boxes(numbers, 100, 10, (0.05, 1.0), hflip=False)] == [0, 0, 7, 7, False]


@pytest.mark.parametrize("ratio", [0.0, NEARLY_1])
def test_a_crop_has_a_pixel_each_way(ratio: float) -> None:
    """0.2 pixels round to none in width or in height, so the second try counts."""
    boxes = random_boxes(draws([0.0, NEARLY_1], [ratio, 0.5]), 2, 2, (0.05, 1.0), hflip=False)
    assert [int(part) for part in boxes] == [0, 0, 2, 2, False]


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [
        (100, 10, [(100 - 13) // 2, 0, 13, 10]),
        (10, 100, [0, (100 - 13) // 2, 10, 13]),
        (80, 100, [0, 0, 80, 100]),
    ],
)
def test_crop_that_never_fits_is_the_central_one(height: int, width: int, box: list[int]) -> None:
    numbers = torch.full((1, DRAWS), 0.5, dtype=torch.float64)
    assert [int(part) for part in random_boxes(numbers, height, width, (1.0, 1.0), hflip=False)] == [*box, False]


def test_normalise_is_the_formula_and_makes_grey_rgb() -> None:
    grey = torch.tensor([0.0, 51.0, 255.0, 102.0]).view(1, 1, 2, 2)
    out = ImageTransform((2, 2), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bilinear").normalise(grey)
    expected = torch.stack([(grey[0, 0] / 255 - m) / s for m, s in ((0.5, 0.2), (0.4, 0.3), (0.3, 0.4))])
    torch.testing.assert_close(out[0], expected)


def test_large_jpeg_is_read_smaller(tmp_path: object) -> None:
    y, x = np.mgrid[0:800, 0:1200]
    smooth = np.stack([x / 1200, y / 800, (x + y) / 2000], -1) * 255
    path = f"{tmp_path}/large.jpg"
    Image.fromarray(smooth.astype(np.uint8)).save(path, quality=95)
    crop = transform((50, 50), "bicubic", crop_scale=(0.5, 1.0))
    with Image.open(path) as image:
        out = crop.train_one(image, crop.numbers(keys(1)))
        assert image.width < 1200
    with Image.open(path) as image:
        image.load()  # too late for a draft
        full = crop.train_one(image, crop.numbers(keys(1)))
    assert (out.float() - full.float()).abs().max() <= 4


@pytest.mark.parametrize("size", [(1801, 1800), (1801, 2400), (4001, 3000), (1800, 2401)])
def test_a_large_jpeg_is_read_smaller_to_its_last_row_and_column(size: tuple[int, int], tmp_path: Path) -> None:
    Image.new("RGB", size, "white").save(tmp_path / "white.jpg")
    with Image.open(tmp_path / "white.jpg") as image:
        assert int(transform((224, 224), "bicubic").test_one(image).min()) == 255
        assert image.size < size


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_every_8_bit_mode_becomes_rgb(mode: str) -> None:
    assert to_rgb(Image.new(mode, (3, 2))).mode == "RGB"


@pytest.mark.parametrize(("mode", "dtype"), [("I;16", "<u2"), ("I;16L", "<u2"), ("I;16B", ">u2"), ("I;16N", "=u2")])
def test_16_bit_keeps_its_upper_bits(mode: str, dtype: str) -> None:
    deep = Image.frombytes(mode, (4, 1), np.array([0, 255, 256, 65535], dtype=dtype).tobytes())
    assert np.array(to_rgb(deep))[0].tolist() == [[0] * 3, [0] * 3, [1] * 3, [255] * 3]


def test_floats_are_refused() -> None:
    with pytest.raises(UserError, match="mode 'F'"):
        to_rgb(Image.new("F", (2, 2)))


def test_unknown_interpolation_is_refused() -> None:
    config = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "input_size": (3, 8, 8), "interpolation": "lanczos"}
    with pytest.raises(UserError, match="'lanczos'"):
        ImageTransform.for_model(config)
