import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    import quick_interpreter

    quick_interpreter.install()
# Two cores are shared between pytest-xdist's workers.
torch.set_num_threads(1)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            # The marker, not the keyword: a checkout in a folder called gpu gives that to every test.
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)
    # The longest first, so that no worker is left with one at the end.
    long = ("interpret", "compile_ahead", "emulated")
    items.sort(key=lambda item: not any(map(item.get_closest_marker, long)))
    # bench.speed.suite deals tests out to processes: a few neighbours at a time, which share kernels.
    if "DELTAMEM_SHARD" in os.environ:
        index, count = map(int, os.environ["DELTAMEM_SHARD"].split("/"))
        mine = [n // 3 % count == index for n in range(len(items))]
        config.hook.pytest_deselected(items=[item for item, keep in zip(items, mine) if not keep])
        items[:] = [item for item, keep in zip(items, mine) if keep]


def pytest_runtest_logreport(report):
    path = os.environ.get("DELTAMEM_OUTCOMES")
    if path and (report.when == "call" or report.outcome != "passed"):
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"{report.outcome} {report.nodeid}\n")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
