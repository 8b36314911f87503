"""Histograms, images and text for the loggers that can hold them; numbers go through `Logger.log_metrics`."""

from typing import Any

import numpy as np
import numpy.typing as npt
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from torch import Tensor

SHOW_IMAGES = (TensorBoardLogger, WandbLogger, MLFlowLogger)
_BINS = 30


def log_histogram(logger: Logger, tag: str, values: Tensor, step: int) -> None:
    """The distribution of ``values``, in TensorBoard and W&B."""
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_histogram(tag, values, step, bins=_BINS)
    elif isinstance(logger, WandbLogger):
        import wandb

        counts = wandb.Histogram(np_histogram=np.histogram(values.cpu().numpy(), bins=_BINS))
        logger.log_metrics({tag: counts}, step)  # type: ignore[dict-item]


def log_image(logger: Logger, tag: str, pixels: npt.NDArray[Any], step: int) -> None:
    """An image (height, width, 3) of bytes: in TensorBoard, W&B, and among the artifacts of MLflow."""
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(tag, pixels, step, dataformats="HWC")
    elif isinstance(logger, WandbLogger):
        logger.log_image(tag, [pixels], step)
    elif isinstance(logger, MLFlowLogger):
        logger.experiment.log_image(logger.run_id, pixels, f"{tag}_step_{step}.png")


def log_text(logger: Logger, tag: str, text: str, step: int) -> None:
    """Markdown: in TensorBoard, W&B, and among the artifacts of MLflow."""
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_text(tag, text, step)
    elif isinstance(logger, WandbLogger):
        logger.log_text(tag, ["text"], [[text]], step=step)
    elif isinstance(logger, MLFlowLogger):
        logger.experiment.log_text(logger.run_id, text, f"{tag}_step_{step}.md")
