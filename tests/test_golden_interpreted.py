"""The golden cases on the Triton kernels, in the interpreter: a process that has TRITON_INTERPRET=1 from the start."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import CASES

pytest.importorskip("triton")
HERE = Path(__file__).parent


@pytest.mark.parametrize("attention", ("eager", "sdpa"))
def test_golden_cases_interpreted(attention):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        HERE / "test_golden.py",
    ]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    done = subprocess.run([*command, "-k", attention], cwd=HERE.parent, env=environment, capture_output=True, text=True)
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert passed and int(passed[1]) == len(CASES), done.stdout[-2000:]
