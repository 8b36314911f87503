"""Lightning's Trainer for the command line."""

from datetime import timedelta
from typing import Any

import lightning as L


class Trainer(L.Trainer):
    """Reads ``1`` as one batch and ``1.0`` as all of them, whatever is imported.

    typing takes Optional[Union[int, float]] and Optional[Union[float, int]] for one and gives whichever came first, and
    the command line tries the types in that order. ``int | float | None`` keeps its own.
    """

    def __init__(
        self,
        *,
        limit_train_batches: int | float | None = None,
        limit_val_batches: int | float | None = None,
        limit_test_batches: int | float | None = None,
        limit_predict_batches: int | float | None = None,
        val_check_interval: int | float | str | timedelta | dict[str, int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            limit_train_batches=limit_train_batches,
            limit_val_batches=limit_val_batches,
            limit_test_batches=limit_test_batches,
            limit_predict_batches=limit_predict_batches,
            val_check_interval=val_check_interval,
            **kwargs,
        )
