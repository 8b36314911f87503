"""Contents of made-up checkpoints."""

import torch


def content(step: int, size: int = 10) -> dict:
    """What looks like a checkpoint of Lightning."""
    state = {"weight": torch.full((size,), float(step))}
    return {"global_step": step, "state_dict": state, "pytorch-lightning_version": "2.6.6", "optimizer_states": []}
