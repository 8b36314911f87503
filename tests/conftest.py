import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from srlora_pl.lowrank import kernels

if TYPE_CHECKING:
    import lightning as L

# The tests' networks are tiny and run in several processes at once: threads would only get in each other's way.
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption(
        "--kernel", choices=["merged", "two-branches"], help="how to compute adapted layers, whatever their shape"
    )


@pytest.fixture(scope="session", autouse=True)
def _kernel(request):
    chosen = request.config.getoption("kernel")
    with pytest.MonkeyPatch.context() as patch:
        if chosen:
            patch.setattr(kernels, "merging_pays", lambda *shape: chosen == "merged")
        yield


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory):
    """The user's own cache is left alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _no_trace(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A run sets the seed of its process; the next test shall not see it."""
    before = dict(os.environ)
    yield
    for name in set(os.environ) - set(before):
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., "L.Trainer"]:
    """Makes a quiet CPU `Trainer` that writes under ``tmp_path``."""
    import lightning as L  # here, for the tests of lowrank load no Lightning

    def make(**overrides: Any) -> "L.Trainer":
        arguments = {
            "accelerator": "cpu",
            "max_steps": 6,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path,
        }
        return L.Trainer(**(arguments | overrides))

    return make
