"""Batched crops and resizes against PIL itself."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchvision.transforms import RandomResizedCrop

from srlora_pl.data import transforms
from srlora_pl.data.transforms import DRAWS, ImageTransform, random_boxes, to_rgb, vertical_first
from srlora_pl.errors import UserError

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
        crop.train(images, keys(2)) if train else crop.test(images)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(seen) == {"highest"}


sides = st.integers(4, 90)


@settings(deadline=None, max_examples=40)
@given(height=sides, width=sides, size=st.tuples(sides, sides), kind=st.sampled_from([*KINDS]), seed=st.integers(0, 99))
def test_random_crops_equal_pil(height: int, width: int, size: tuple[int, int], kind: str, seed: int) -> None:
    images = torch.randint(0, 256, (5, 3, height, width), generator=torch.Generator().manual_seed(seed)).byte()
    crop = transform(size, kind, crop_scale=(0.05, 1.0))
    boxes = crop.boxes(crop.numbers(keys(5, seed)), height, width)

    expected = []
    for image, top, left, h, w, flip in zip(images, *(part.tolist() for part in boxes), strict=True):
        small = pil_resize(picture(image).crop((left, top, left + w, top + h)), size, kind)
        expected.append(levels(small.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else small))
    difference = (crop.train(images, keys(5, seed)) - torch.stack(expected)).abs()

    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 0.1  # ties of single ratios; 0.002 on average


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(32, 32), (20, 61), (80, 33), (90, 30)])
def test_evaluation_equals_pil(kind: str, shape: tuple[int, int]) -> None:
    images = torch.randint(0, 256, (2, 3, *shape)).byte()
    plain = transform((24, 40), kind).test(images)
    assert (plain - torch.stack([levels(pil_resize(picture(i), (24, 40), kind)) for i in images])).abs().max() <= 1

    big = (round(24 / 0.8), round(40 / 0.8))
    left, top = (big[1] - 40) // 2, (big[0] - 24) // 2
    cut = [levels(pil_resize(picture(i), big, kind).crop((left, top, left + 40, top + 24))) for i in images]
    middle = transform((24, 40), kind, test_crop_pct=0.8).test(images)
    assert (middle - torch.stack(cut)).abs().max() <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_worker_path_gives_the_batch_path(kind: str) -> None:
    images = torch.randint(0, 256, (8, 3, 70, 50)).byte()
    crop = transform((32, 32), kind, test_crop_pct=0.9)
    numbers = crop.numbers(keys(8)).split(1)
    one_by_one = torch.stack([crop.train_one(picture(i), n) for i, n in zip(images, numbers, strict=True)])
    assert (crop.train(images, keys(8)) - one_by_one.float()).abs().max() <= 1
    one_by_one = torch.stack([crop.test_one(picture(i)) for i in images])
    assert (crop.test(images) - one_by_one.float()).abs().max() <= 1


def test_augmentation_depends_on_the_key_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randint(0, 256, (6, 3, 20, 20)).byte()
    crop, all_keys = transform((16, 16), "bicubic"), keys(6, epoch=2)
    together = crop.train(images, all_keys)
    order = torch.tensor([4, 1, 5])
    assert torch.equal(crop.train(images[order], all_keys[order]), together[order])
    assert not torch.equal(crop.train(images, keys(6, epoch=3)), together)
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert not torch.equal(crop.train(images, all_keys), together)


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


def test_crop_that_never_fits_is_the_central_one() -> None:
    boxes = random_boxes(torch.full((1, DRAWS), 0.5, dtype=torch.float64), 100, 10, (1.0, 1.0), hflip=False)
    assert [int(part) for part in boxes] == [(100 - 13) // 2, 0, 13, 10, 0]


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


def test_16_bit_keeps_its_upper_bits_and_floats_are_refused() -> None:
    deep = Image.fromarray(np.array([[0, 255, 256, 65535]], dtype=np.uint16))
    assert np.array(to_rgb(deep))[0, :, 0].tolist() == [0, 0, 1, 255]
    with pytest.raises(UserError, match="mode 'F'"):
        to_rgb(Image.new("F", (2, 2)))


def test_unknown_interpolation_is_refused() -> None:
    config = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "input_size": (3, 8, 8), "interpolation": "lanczos"}
    with pytest.raises(UserError, match="'lanczos'"):
        ImageTransform.for_model(config)
