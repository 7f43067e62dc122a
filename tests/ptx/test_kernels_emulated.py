"""Runs the package's kernels on the emulator, each run in a process of its own: Triton must compile, not interpret."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
KERNELS = {
    "flag_kernel", "map_kernel", "carry_kernel", "scan_kernel", "read_kernel", "step_kernel", "steer_kernel",
    "steer_heads_kernel", "decode_kernel", "map_both_kernel", "carry_both_kernel", "walk_kernel", "token_kernel",
    "read_backward_kernel", "steer_backward_kernel",
}  # fmt: skip


def run(*arguments, python=sys.executable):
    """pytest on the emulator → how many tests passed and the kernels that were launched."""
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "emulator_plugin"]
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTEST_ADDOPTS")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, (HERE, ROOT, ROOT / "kernels")))}
    done = subprocess.run([*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-2000:]
    launched = re.search(r"emulated launches: \d+ of (.*)", done.stdout)
    return int(re.search(r"(\d+) passed", done.stdout)[1]), set(launched[1].split(", "))


@pytest.mark.emulated
def test_kernels_emulated():
    passed, launched = run("-m", "not soak", str(HERE / "emulated"))
    assert passed >= 30 and launched == KERNELS
