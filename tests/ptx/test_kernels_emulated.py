"""Runs the package's kernels on the emulator, each run in a process of its own: Triton must compile, not interpret.

make soak runs the property suites of tests/kernels/interpreted on it too, for two architectures, with approximate
instructions as far off as a GPU's may be, and once more with Triton 3.6 if DELTAMEM_TRITON36 names a Python that has
it (make triton36 builds one).
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
INTERPRETED = ROOT / "tests" / "kernels" / "interpreted"
SUITES = ("scan", "step", "heads", "backward", "ops", "model", "arguments")
KERNELS = {
    "token_flags_kernel", "token_parts_kernel", "chunk_transition_kernel", "state_passing_kernel",
    "chunk_scan_kernel", "repair_kernel",
    "read_kernel", "step_kernel", "steer_kernel", "steer_heads_kernel", "decode_kernel",
    "chunk_transition_backward_kernel", "state_passing_backward_kernel", "block_states_kernel",
    "projection_gradient_kernel", "read_backward_kernel", "steer_backward_kernel",
}  # fmt: skip
ARCHITECTURES = (80, 90)


def run(*arguments, python=sys.executable):
    """pytest on the emulator → how many tests passed, and the kernels that were launched."""
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "emulator_plugin"]
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTEST_ADDOPTS")}
    environment = {k: v for k, v in environment.items() if not k.startswith("PYTEST_XDIST")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, (HERE, ROOT, ROOT / "kernels")))}
    command += map(str, arguments)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-2000:]
    launched = re.search(r"emulated launches: \d+ of (.*)", done.stdout)
    return int(re.search(r"(\d+) passed", done.stdout)[1]), set(launched[1].split(", "))


@pytest.mark.emulated
def test_kernels_emulated():
    passed, launched = run("-m", "not soak", HERE / "emulated")
    assert passed >= 30 and launched == KERNELS


@pytest.mark.soak
@pytest.mark.emulated
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_larger_problems_emulated(arch):
    """Decode under all schedules, broken arrivals, every rank and dtype, several chunks, many rows."""
    passed, _ = run("-m", "soak", "--emu-arch", arch, HERE / "emulated")
    assert passed >= 60


@pytest.mark.soak
@pytest.mark.emulated
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("suite", SUITES)
def test_suites_emulated(suite, arch):
    run("-m", "not soak", "--emu-arch", arch, INTERPRETED / f"test_interpreted_{suite}.py")


@pytest.mark.soak
@pytest.mark.emulated
@pytest.mark.parametrize("suite", ("scan", "step", "heads", "backward"))
def test_suites_with_approximate_instructions_off(suite):
    run(
        "-m",
        "not soak",
        "--emu-ulps",
        2,
        "--emu-seed",
        7,
        "--emu-no-races",
        INTERPRETED / f"test_interpreted_{suite}.py",
    )


@pytest.mark.soak
@pytest.mark.emulated
def test_far_addresses_emulated():
    run("-m", "soak", "--emu-no-races", INTERPRETED / "test_interpreted_far.py")


@pytest.mark.soak
@pytest.mark.emulated
@pytest.mark.parametrize("what", ("emulated", *SUITES[:4]))
def test_triton_36_emulated(what):
    python = os.environ.get("DELTAMEM_TRITON36")
    if not python:
        pytest.skip("DELTAMEM_TRITON36 names no Python with Triton 3.6: make triton36")
    version = subprocess.run([python, "-c", "import triton; print(triton.__version__)"], capture_output=True, text=True)
    assert version.stdout.startswith("3.6"), version
    path = HERE / "emulated" if what == "emulated" else INTERPRETED / f"test_interpreted_{what}.py"
    run("-m", "not soak", path, python=python)
