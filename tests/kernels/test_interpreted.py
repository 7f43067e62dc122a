"""Runs tests/kernels/interpreted in a process that has TRITON_INTERPRET=1 before Triton is imported."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
pytest.importorskip("triton")


@pytest.mark.interpret
def test_kernels_interpreted():
    check("not soak and not thorough", 120)


@pytest.mark.soak
@pytest.mark.interpret
def test_kernels_interpreted_with_more_examples(monkeypatch):
    monkeypatch.setenv("DELTAMEM_EXAMPLES", "20")
    check("not soak", 120)


@pytest.mark.soak
@pytest.mark.interpret
def test_kernels_interpreted_by_triton_as_it_is(monkeypatch):
    monkeypatch.setenv("DELTAMEM_PLAIN_INTERPRETER", "1")
    check("not soak", 120)


@pytest.mark.soak
@pytest.mark.interpret
def test_kernels_interpreted_at_far_addresses():
    check("soak", 4)


def check(which, least):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", which, str(HERE / "interpreted")]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    done = subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True)
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-2000:]
    assert passed and int(passed[1]) >= least, done.stdout[-2000:]
