"""Run by tests/kernels/test_interpreted.py, in a process that has TRITON_INTERPRET=1 before Triton is imported."""

import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
EXAMPLES = int(os.environ.get("DELTAMEM_EXAMPLES", "5"))  # of a property; make soak asks for more
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

if INTERPRETED:
    import torch
    from hypothesis import settings

    torch.set_num_threads(1)
    settings.register_profile("interpreted", deadline=None, derandomize=True, max_examples=EXAMPLES, database=None)
    settings.load_profile("interpreted")


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    from kernel_properties import poisoned

    from deltamem_kernels.triton import launch

    monkeypatch.setattr(launch, "empty", poisoned)


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE not in item.path.parents:  # a hook of this folder sees every test of the run
            continue
        item.add_marker("interpret")
        # A NaN on its way through a register is what these tests are about; numpy remarks on it.
        item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning"))
