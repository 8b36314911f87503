"""Batches of GLUE's texts as a run makes them, without a run."""

from types import SimpleNamespace
from typing import Any

from torch import Tensor

from srlora_pl import GLUEData


def glue_batches(task: str, root: str, tokenizer: str, size: int, count: int, padded: bool) -> list[dict[str, Tensor]]:
    """``count`` whole batches evenly through an epoch; a few in a row would be of any length.

    In length buckets or, with ``padded``, in any order and padded to 128.
    """
    data = GLUEData(task, root, batch_size=size, pad_to_max_length=padded)
    module = SimpleNamespace(backbone_name=tokenizer, num_classes=data.num_classes)
    trainer: Any = SimpleNamespace(
        lightning_module=module, world_size=1, global_rank=0, state=SimpleNamespace(fn="fit")
    )
    data.trainer = trainer
    data.load("fit")
    assert data.train_set is not None
    order = [piece for piece in data.train_order(0).split(size) if len(piece) == size]
    chosen = (order[i * len(order) // count] for i in range(count))
    return [data.train_set.__getitems__([(int(i), 0) for i in piece]) for piece in chosen]
