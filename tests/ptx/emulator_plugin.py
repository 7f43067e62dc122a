"""pytest -p emulator_plugin: kernels compiled by Triton and run on the emulator, in this process.

    PYTHONPATH=tests/ptx python -m pytest -p emulator_plugin -p no:xdist tests/kernels/interpreted -k test_decode

For tests/ptx/emulated, and for the suites of tests/kernels/interpreted, which here run compiled code. Triton must not
see TRITON_INTERPRET, which those suites ask the environment for: Triton's own switch is pinned to off before a kernel
is decorated, then the variable is set.
"""

import os

import project
import pytest

project.prepare()
project.pin(False)
os.environ["TRITON_INTERPRET"] = "1"
os.environ["DELTAMEM_EMULATED"] = "1"


def pytest_addoption(parser):
    group = parser.getgroup("emulator", "PTX emulator")
    group.addoption("--emu-arch", type=int, default=90, help="compile for sm_80, 90, … (90)")
    group.addoption("--emu-seed", type=int, default=0, help="of the schedules (0)")
    group.addoption("--emu-strategy", default=None, help="how warps take turns (drawn for each launch)")
    group.addoption("--emu-ulps", type=int, default=0, help="move approximate instructions' results by up to this (0)")
    group.addoption("--emu-examples", type=int, default=4, help="hypothesis examples of a test (4)")
    group.addoption("--emu-fusion", choices=("asked", "off", "on"), default="asked", help="FP fusion of all kernels")
    group.addoption("--emu-no-races", action="store_true", help="do not look for races: half the time")


def pytest_configure(config):
    from hypothesis import HealthCheck, settings

    get = config.getoption
    settings.register_profile(
        "emulated", deadline=None, derandomize=True, max_examples=get("--emu-examples"), database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    settings.load_profile("emulated")
    config.emulator = project.emulator(
        get("--emu-arch"), fusion={"asked": None, "off": False, "on": True}[get("--emu-fusion")],
        ulps=get("--emu-ulps"), seed=get("--emu-seed"), races=not get("--emu-no-races"),
        strategy=get("--emu-strategy"),
    )  # fmt: skip


@pytest.hookimpl(trylast=True)
def pytest_plugin_registered(plugin):
    # The suites' conftest loads a profile of its own before its tests are imported.
    if str(getattr(plugin, "__file__", "")).endswith("conftest.py"):
        from hypothesis import settings

        if "emulated" in getattr(settings, "_profiles", {}):
            settings.load_profile("emulated")


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("ignore"))


def pytest_runtest_teardown(item):
    item.config.emulator.records.clear()


def pytest_sessionfinish(session, exitstatus):
    if exitstatus == 0 and not session.config.emulator.names and not session.config.getoption("collectonly"):
        session.exitstatus = 1  # a run that has not used the emulator is no check


def pytest_terminal_summary(terminalreporter, config):
    emulator, write = config.emulator, terminalreporter.write_line
    write(f"emulated launches: {sum(emulator.names.values())} of {', '.join(sorted(emulator.names))}")
    for (what, *places), n in sorted(emulator.benign.items()):
        write(f"race without effect: {n} × {what}: {' '.join(places)}")
