"""Run by tests/ptx/test_kernels_emulated.py, in a process in which the emulator is Triton's device."""

import os
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
EMULATED = os.environ.get("DELTAMEM_EMULATED") == "1"
collect_ignore_glob = [] if EMULATED else ["test_*.py"]


@pytest.fixture
def emulator(pytestconfig):
    """The emulator, as it was after the test."""
    emulator = pytestconfig.emulator
    saved = emulator.strict, emulator.edit, emulator.seed
    emulator.records.clear()
    yield emulator
    emulator.strict, emulator.edit, emulator.seed = saved


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE not in item.path.parents:  # a hook of this folder sees every test of the run
            continue
        item.add_marker("emulated")
