"""Images for classification: known data sets, the user's own folder, or a data set of ``datasets``."""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from srlora_pl.data.base import DataModule, KeyedDataset, split_keys
from srlora_pl.data.images.folders import picture_files
from srlora_pl.data.images.pictures import Split, into_memory
from srlora_pl.data.images.sources import NamesOnly, find_source
from srlora_pl.data.images.transforms import ImageTransform
from srlora_pl.data.loader import Key, user_error_as_batch
from srlora_pl.data.protocols import Batch, model_of
from srlora_pl.util.errors import UserError, listed, require, require_one_of


class ImageData(DataModule):
    """Images and labels, split, augmented, resized and normalised for the model at hand.

    Batches, once on the device, are dicts of ``image``, float32 (b, 3, H, W) normalised; ``label``, int64 (b,),
    absent where there is none; ``index``, int64 (b,), the position in the split.

    Mean, std, size and interpolation are the model's (its ``data_config``). Images of one size that fit in memory
    are kept there as bytes, and cropped and resized by the batch on the device; others are decoded, cropped and resized
    in the workers. The validation split is the source's own, or a stratified ``val_fraction`` of the training split.

    Args:
        name: ``digits`` (shipped), ``mnist``, ``cifar10``, ``cifar100`` or ``stl10`` (downloaded into ``root`` when
            missing); None for data of your own at ``root``.
        root: a folder; without ``name`` one with a folder of images per class (or ``train/``, ``val/``, ``test/``
            with such folders in them, also as ``Training/``, ``valid/`` and the like), one with images and a
            ``metadata.csv``, a folder of a data set of ``datasets``, or that data set's name on the hub. Hidden
            folders and files are left out.
        batch_size: images in a batch, per device.
        image_column: column of the images in a data set of ``datasets``.
        label_column: column of the labels there.
        hflip: mirror half of the training images left to right.
        crop_scale: smallest and largest share of the area that a random training crop keeps.
        test_crop_pct: evaluation images are resized to size / test_crop_pct, and the middle is kept; None takes the
            model's own ``crop_pct``.
        crop_mode: how they are resized. ``squash``: each side by itself, so that all of an image is seen, but not in
            its ratio; ``center``, as most models were evaluated: in its ratio, and what stands out is cut off.
        predict_root: a folder of images or one file to predict; None predicts the test split.
        class_names: of a trained model, in the order of its outputs, to predict ``predict_root`` without the data at
            ``root``; ``python cli.py predict`` takes them from the checkpoint.
        kwargs: the other arguments of `DataModule`.

    Raises:
        UserError: the data is missing, empty, broken or of one class; an argument is out of its range.
    """

    kind = "image"

    def __init__(
        self,
        name: str | None = None,
        root: str = "data",
        batch_size: int = 64,
        *,
        image_column: str = "image",
        label_column: str = "label",
        hflip: bool = True,
        crop_scale: tuple[float, float] = (0.08, 1.0),
        test_crop_pct: float | None = 1.0,
        crop_mode: Literal["squash", "center"] = "squash",
        predict_root: str | None = None,
        class_names: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(batch_size=batch_size, **kwargs)
        smallest, largest = crop_scale
        require("data.crop_scale", list(crop_scale), "0 < smallest <= largest <= 1", 0 < smallest <= largest <= 1)
        pct_holds = test_crop_pct is None or 0 < test_crop_pct <= 1
        require("data.test_crop_pct", test_crop_pct, "above 0 and at most 1", pct_holds)
        require_one_of("data.crop_mode", crop_mode, ("squash", "center"))
        self.options: dict[str, Any] = {"crop_scale": tuple(crop_scale), "hflip": hflip}
        self.options |= {"test_crop_pct": test_crop_pct, "crop_mode": crop_mode}
        self.predict_root = predict_root
        self.source = (
            find_source(name, root, image_column, label_column) if class_names is None else NamesOnly(class_names)
        )
        self.class_names = list(self.source.class_names)
        self.num_classes = len(self.class_names)
        if self.num_classes < 2:
            raise UserError(
                f"data.root '{root}' has no two classes, only {listed(map(repr, self.class_names)) or 'none'}; give "
                f"images of at least two."
            )
        self.transform: ImageTransform | None = None
        self._splits: dict[str, Split] = {}

    def prepare_data(self) -> None:
        """Download what is missing; the user's own pictures are predicted without the training data."""
        predicts = self.trainer is not None and self.trainer.state.fn == "predict"
        if not (predicts and self.predict_root):
            self.source.prepare()

    def load(self, stage: str) -> None:
        """Read the splits of ``stage``; the model's data config decides their size and scale."""
        config = model_of(self.trainer).data_config
        if config is None:
            raise UserError(
                "ImageData needs a model with data_config (mean, std, input_size, interpolation); "
                "set self.data_config in the model's __init__."
            )
        self.transform = ImageTransform.for_model(config, **self.options)
        self._splits.pop("predict", None)  # the folder, or its content, may have changed
        super().load(stage)
        for split in self.needed(stage):
            self._split(split)
        self.left_out = dict(sum((split.left_out for split in self._splits.values()), Counter()))

    def splits(self, use: str) -> list[str]:
        if use == "predict" and self.predict_root:
            return [use]
        name = "test" if use == "predict" else use
        exists = self.has_test_labels if use == "test" else name == "train" or name in self.source.splits
        return [name] if exists else []

    @property
    def has_test_labels(self) -> bool:
        return self.source.has_labels("test")

    def sample_name(self, index: int) -> str:
        """The name of a predicted image: its file, or its index in the test split."""
        return self._splits[self.splits("predict")[0]].name(index)

    def _split(self, name: str) -> Split:
        if name not in self._splits:
            own = self.predict_root if name == "predict" else None
            split = self.source.load(name) if own is None else picture_files(Path(own), "data.predict_root")
            if not isinstance(split.images, Tensor):
                split.images = into_memory(split.images)
            self._splits[name] = split
        return self._splits[name]

    def dataset(self, split: str, rows: Tensor | None, use: str) -> "MemoryImages | FileImages":
        assert self.transform is not None
        images, labels = self._split(split).images, None if use == "predict" else self._split(split).labels
        kind = MemoryImages if isinstance(images, Tensor) else FileImages
        return kind(images, labels, rows, self.transform)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Crop and resize the images that the workers did not, then normalise; the batch is on its device."""
        assert self.transform is not None
        batch = dict(batch)
        image, crops = batch.pop("image"), batch.pop("crops", None)
        if batch.pop("whole"):
            image = self.transform.test(image) if crops is None else self.transform.train(image, crops)
        batch = {"image": self.transform.normalise(image), **batch}
        # For 64-true Lightning converts before the images are floats.
        return self.trainer.precision_plugin.convert_input(batch) if self.trainer else batch


class _Images(KeyedDataset):
    """Some ``rows``, int64 (m,), or all images of a split."""

    def __init__(self, images: Any, labels: Tensor | None, rows: Tensor | None, transform: ImageTransform) -> None:
        self.images, self.labels, self.transform = images, labels, transform
        self.rows = torch.arange(len(images)) if rows is None else rows


class MemoryImages(_Images):
    """Images of one size, uint8 (n, c, h, w), handed out whole, in training with their crops."""

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        index, epoch = split_keys(keys)
        batch = self.labelled(index, image=self.images[self.rows[index]], whole=True)
        if epoch is not None:
            batch["crops"] = self.transform.crops(torch.stack([epoch, index], 1), *self.images.shape[2:])
        return batch


class FileImages(_Images):
    """Encoded images of any size, decoded, cropped and resized here, in the workers."""

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        index, epoch = split_keys(keys)
        rows = self.rows[index].tolist()
        try:
            images = self._test(rows) if epoch is None else self._train(rows, torch.stack([epoch, index], 1))
        except UserError as error:
            return user_error_as_batch(error)
        return self.labelled(index, image=images, whole=False)

    def _test(self, rows: list[int]) -> Tensor:
        return torch.stack([self.images.decode(row, self.transform.test_one) for row in rows])

    def _train(self, rows: list[int], keys: Tensor) -> Tensor:
        numbers = self.transform.numbers(keys).split(1)
        images = [
            self.images.decode(row, partial(self.transform.train_one, numbers=own))
            for row, own in zip(rows, numbers, strict=True)
        ]
        return torch.stack(images)
