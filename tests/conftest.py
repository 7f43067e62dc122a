import hashlib
import math
import os

import pytest
import torch

# The emulator's processes have the variable, too, and compile: what is changed in Triton would fail there.
if os.environ.get("TRITON_INTERPRET") == "1" and os.environ.get("DELTAMEM_EMULATED") != "1":
    import quick_interpreter

    quick_interpreter.install()
# Two cores are shared between pytest-xdist's workers.
torch.set_num_threads(1)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ELSEWHERE = "another process runs it"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            # The marker, not the keyword: a checkout in a folder called gpu gives that to every test.
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)
    # The longest first, so that no worker is left with one at the end.
    long = ("interpret", "compile_ahead", "emulated", "xdist_group")
    items.sort(key=lambda item: not any(map(item.get_closest_marker, long)))
    # Before them numba's loops, one rank after the other, so that no two workers compile the same.
    items.sort(key=lambda item: item.callspec.indices["rank"] if item.get_closest_marker("compiles") else math.inf)
    # What takes a minute to compile comes first there, too.
    slow = (
        "test_scan_gradient[300",
        "test_long_gradient",
        "test_to_the_bit",
        "test_packed_and_slots",
        "test_decode[16",
    )
    if "DELTAMEM_CLAIMS" in os.environ:
        items.sort(key=lambda item: not item.name.startswith(slow))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """bench.speed.suite starts several processes: each test is run by the one that comes to it first."""
    claims = os.environ.get("DELTAMEM_CLAIMS")
    if claims:
        try:
            open(os.path.join(claims, hashlib.sha1(item.nodeid.encode()).hexdigest()), "x").close()
        except FileExistsError:
            pytest.skip(ELSEWHERE)


def pytest_runtest_logreport(report):
    path = os.environ.get("DELTAMEM_OUTCOMES")
    elsewhere = report.outcome == "skipped" and ELSEWHERE in str(report.longrepr)
    if path and not elsewhere and (report.when == "call" or report.outcome != "passed"):
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"{report.outcome} {report.nodeid}\n")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
