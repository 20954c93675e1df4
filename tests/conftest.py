import os
import sys
from pathlib import Path

import pytest

# before torch is imported, which reads it: threads of several workers on the same cores wait for each other
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

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


@pytest.fixture
def two_processes(monkeypatch):
    """What goes before `-m MODULE` to run it in two processes of one thread, on the CPU."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # accelerate's own launcher starts a single process where there is no GPU
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """The folder of a tiny Stable Diffusion pipeline."""
    import tiny_diffusion as tiny  # diffusers, which most tests do without

    folder = tmp_path_factory.mktemp("sd")
    tiny.stable_diffusion(folder / "words").save_pretrained(folder / "pipe")
    return folder / "pipe"
