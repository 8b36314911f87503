"""Lightning's finders of a learning rate and a batch size search before a run, which then begins with what they found.

As callbacks they would search in the first moment of the run itself: the scheduler would then bring back the rate of
the config, and a run that goes on would search again and start from other settings than its checkpoint.
"""

import tempfile
from collections.abc import Callable
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.tuner import Tuner

from srlora_pl.util.errors import UserError

_PATHS = {
    f"{home}.{kind.__name__}": kind
    for kind in (LearningRateFinder, BatchSizeFinder)
    for home in (kind.__module__, "lightning.pytorch.callbacks")
}


def split(callbacks: Any) -> tuple[list[Namespace], Any]:
    """The finders among the settings ``callbacks``, and the others; a subclass may search at another time and stays."""
    every = callbacks if isinstance(callbacks, list) else [callbacks]
    found = [each for each in every if getattr(each, "class_path", None) in _PATHS]
    return found, ([each for each in every if each not in found] or None) if found else callbacks


class Finder:
    """One finder of the settings.

    Attributes:
        name: of its class.
        part, key: what it searches, such as ``model`` and ``lr``.
    """

    def __init__(self, settings: Namespace) -> None:
        kind = _PATHS[settings.class_path]
        self.arguments = dict(vars(settings.init_args))
        self.name, self.finds_rate = kind.__name__, kind is LearningRateFinder
        self.part = "model" if self.finds_rate else "data"
        self.key = (self.arguments["attr_name"] or "lr") if self.finds_rate else self.arguments["batch_arg_name"]

    def found_before(self, checkpoint: dict[str, Any]) -> Any:
        """What the run that wrote ``checkpoint`` has begun with; None where the file does not tell."""
        if self.finds_rate:
            return checkpoint.get("hyper_parameters", {}).get(self.key)
        name = f"data.{self.key}"
        return next((state[name] for state in checkpoint.values() if isinstance(state, dict) and name in state), None)

    def search(self, make_trainer: Callable[..., Trainer], model: Any, data: Any) -> Any:
        """What is found for ``model`` and ``data``, which are not to be used again; None: nothing is."""
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(
                logger=DummyLogger(), callbacks=[], default_root_dir=folder, enable_model_summary=False
            )
            if trainer.world_size > 1:  # they would have to begin twice
                raise UserError(
                    f"the callback {self.name} searches in one process only: let it search with trainer.devices 1, and "
                    f"give {self.part}.{self.key} to the run with several"
                )
            if not self.finds_rate:
                return Tuner(trainer).scale_batch_size(model, datamodule=data, **self.arguments)
            arguments = {name: value for name, value in self.arguments.items() if name != "num_training_steps"}
            count = self.arguments["num_training_steps"]
            result = Tuner(trainer).lr_find(model, datamodule=data, num_training=count, **arguments)
            return result.suggestion() if result and self.arguments["update_attr"] else None
