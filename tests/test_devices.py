"""Nothing is left on the CPU that a GPU's tensors meet: on a device without hardware, which refuses what a GPU does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

HERE = Path(__file__).resolve().parent


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch can't have a device written in Python",
)
@pytest.mark.parametrize("case", ["core", "recognition", "text_to_image"])
def test_on_a_device(case, tmp_path):
    words = [sys.executable, str(HERE / "device_cases.py"), case, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": f"{HERE.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "0"}  # a real GPU has nothing to do with it
    done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
