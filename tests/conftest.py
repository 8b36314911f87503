import pytest
import torch

from srlora_pl.lowrank import kernels

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
