"""The tests marked ``gpu``, dealt out to several pytest processes; no plugin is needed for that.

tests/conftest.py reads ``DELTAMEM_CLAIMS`` (a folder in which a process notes each test that it takes on) and
``DELTAMEM_OUTCOMES`` (a file that gets a line for each test as soon as it is through): a run that is cut off still says
what passed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ..instrument import machine
from ..instrument.rows import Row, counted, refused

ROOT = machine.ROOT
LOG = "gpu-tests.txt"
FAREWELL = 15  # seconds in which interrupted tests name their failures
MOST = 16  # processes: each has a CUDA context, half a gigabyte of the GPU's memory, and compiles on a core
NO_TESTS = 5  # pytest's exit status where a process got none


def files() -> list[str]:
    """The files with tests for a GPU: every process would import all the others too."""
    return [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text("utf-8")]


def last_line(text: str) -> str:
    """The last line of a process's output that says anything."""
    return next((line[:200] for line in text.splitlines()[::-1] if line.strip()), "no message")


def end(process: subprocess.Popen) -> None:
    """End a process that was started in a session of its own, with everything that it started."""
    with contextlib.suppress(ProcessLookupError):  # the group goes on while one of it does
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait(process: subprocess.Popen, seconds: float | None) -> int | None:
    """The exit status, or None if it takes longer."""
    try:
        return process.wait(None if seconds is None else max(0.0, seconds))
    except subprocess.TimeoutExpired:
        return None


def output_of(command: list[str], seconds: float | None, stream: str = "stdout", **options) -> tuple[str, int | None]:
    """What a process writes to ``stream``, and its exit status (None: out of time); all that it started ends with it.

    Args:
        seconds: how long it may take; None: as long as it does.
        options: of ``subprocess.Popen``.

    Raises:
        OSError: it cannot be started.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as file:
        process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **{stream: file}, **options)
        status = wait(process, seconds)
        end(process)  # what it started may go on without it
        file.seek(0)
        return file.read(), status


def _start(marker: str, index: int, folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "pytest", "-m", marker, "-q", "--tb=short", "--maxfail=20"]
    command += ["-p", "no:cacheprovider", *files()]
    outcomes = folder / f"outcomes-{index}"
    claims = folder / "claims"
    claims.mkdir(exist_ok=True)
    environment = os.environ | {"DELTAMEM_CLAIMS": str(claims), "DELTAMEM_OUTCOMES": str(outcomes)}
    with (folder / f"log-{index}").open("w", encoding="utf-8") as log:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )


def _outcomes(folder: Path) -> dict[str, list[str]]:
    """Names of the tests by outcome, those first that ended first in their process."""
    found: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}
    for path in sorted(folder.glob("outcomes-*")):
        for line in path.read_text("utf-8").splitlines():
            outcome, _, name = line.partition(" ")
            found[outcome].append(name)
    return found


def run(output: Path, seconds: float, full: bool, processes: int | None = None) -> Row:
    """``pytest -m gpu`` as a row; what the processes printed goes to ``output`` if something failed.

    Args:
        seconds: how long it may take; what has ended by then counts.
        full: with the tests marked ``soak``.
        processes: how many; None: as many as cores, at most ``MOST``.
    """
    marker = "gpu" if full else "gpu and not soak"
    count = processes or min(MOST, machine.cores())
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        running = [_start(marker, index, folder) for index in range(count)]
        statuses = _wait(running, start + seconds)
        found = _outcomes(folder)
        logs = [path.read_text("utf-8", errors="replace") for path in sorted(folder.glob("log-*"))]
    values = {name: len(tests) for name, tests in found.items()} | {"seconds": round(time.perf_counter() - start)}
    whole = all(status in (0, NO_TESTS) for status in statuses)
    parameters = {"marker": marker, "processes": count}
    if whole and found["passed"] and not found["failed"]:
        row = counted("tests", parameters, "all passed")
    else:
        output.mkdir(parents=True, exist_ok=True)
        (output / LOG).write_text("\n".join(logs), encoding="utf-8")
        row = refused("tests", parameters, _complaint(found, statuses, seconds, logs))
    row.values |= values
    print(f"tests: {row.note}; " + ", ".join(f"{key} {value}" for key, value in values.items()), flush=True)
    return row


def _wait(running: list[subprocess.Popen], until: float) -> list[int | None]:
    """Exit statuses; None for those that were interrupted when the time was up."""
    statuses = [wait(process, until - time.perf_counter()) for process in running]
    late = [process for process, status in zip(running, statuses, strict=True) if status is None]
    for process in late:
        process.send_signal(signal.SIGINT)
    farewell = time.perf_counter() + FAREWELL
    for process in late:
        wait(process, farewell - time.perf_counter())
        end(process)
    return statuses


def _complaint(found: dict[str, list[str]], statuses: list[int | None], seconds: float, logs: list[str]) -> str:
    """Why the tests did not all pass, in a line."""
    said = []
    if None in statuses:
        said.append(f"not through after {seconds:.0f} s")
    if found["failed"]:
        said.append("failed: " + ", ".join(found["failed"][:5]) + (" …" if len(found["failed"]) > 5 else ""))
    odd = [n for n, status in enumerate(statuses) if status not in (0, 1, NO_TESTS, None)]
    if odd:
        said.append(f"pytest ended with {statuses[odd[0]]}: {last_line(logs[odd[0]])}")
    return "; ".join(said) or "no test passed"
