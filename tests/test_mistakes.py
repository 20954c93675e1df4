"""Mistakes and warnings are told in one line; tests/test_compose.py has each kind of a mistake."""

import subprocess
import sys


def test_own_warnings_are_one_line_and_other_packages_are_pythons(tmp_path):
    code = """
import warnings
from vislora.compose import command
from vislora.paths import PACKAGE

def body(config, out):
    warnings.warn_explicit("what is odd", UserWarning, str(PACKAGE / "models" / "vit.py"), 7)
    warnings.warn_explicit("what is old", FutureWarning, "/lib/other.py", 7)

command("resize", body, ["adapter=a", "rank=2", "out=b"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stderr == "vislora: what is odd\n/lib/other.py:7: FutureWarning: what is old\n"
