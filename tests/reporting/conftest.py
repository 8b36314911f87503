import pytest

from tests.helpers.watched import Watched, finished, prepared


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    return finished(prepared(tmp_path_factory.mktemp("watched")))
