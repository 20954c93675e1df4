import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Nothing outside the tests' folder is read or written as a cache."""
    patch = pytest.MonkeyPatch()
    patch.setenv("VISLORA_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()
