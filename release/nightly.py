"""The oldest and newest of what is supported, deprecations as errors: ``python -m release.nightly [CELL …]``.

A cell is an interpreter and versions of torch, transformers and Triton, in an environment of its own below ``--place``
(6 GB with a torch for GPUs, removed afterwards; pip's own settings say from where packages come). The oldest are the
floors that setup.py declares, each with its newest patch release; the newest are what pip finds. Exit status 0 if every
cell passed, 1 if one failed, 2 for arguments, 3 if none failed and one was not run, such as for want of an interpreter.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .steps import (
    FAILED,
    NOT_RUN,
    PASSED,
    ROOT,
    StepFailed,
    Steps,
    clean_environment,
    install,
    make_environment,
    run,
    run_logged,
)
from .steps import table as table_of

PINNED = ("torch", "transformers", "triton")
OLDEST, NEWEST = "oldest", "newest"
# numba is the extra cpu; the tests use the rest.
TEST_TOOLS = ("numba>=0.61", "pytest>=8.3,<9.2", "pytest-xdist>=3.6", "hypothesis>=6.130", "nltk>=3.9")
TESTS = (
    "tests/adapter",
    "tests/memory",
    "tests/storage",
    "tests/text",
    "tests/session/test_session.py",
    "tests/session/test_session_files.py",
    "tests/model/test_cache.py",
    "tests/model/test_patch.py",
    "tests/model/test_segments_in_generate.py",
    "tests/kernels/test_golden.py",
    "tests/kernels/test_golden_interpreted.py",
)
DEPRECATIONS = ("DeprecationWarning", "PendingDeprecationWarning", "FutureWarning")


@dataclass(frozen=True)
class Cell:
    """One environment.

    Attributes:
        name: of the row.
        python: such as ``3.11``.
        versions: package → OLDEST or NEWEST, of those in PINNED.
        more: further requirements, for the reasons beside them.
    """

    name: str
    python: str
    versions: tuple[tuple[str, str], ...]
    more: tuple[str, ...] = ()


def _all(age: str) -> tuple[tuple[str, str], ...]:
    return tuple((name, age) for name in PINNED)


_OLD_TRITON = ("numpy<2.4",)  # the interpreter of Triton 3.6 indexes in a way that NumPy 2.4 refuses
CELLS = (
    Cell("oldest", "3.11", _all(OLDEST), _OLD_TRITON),
    Cell("newest", "3.11", _all(NEWEST)),
    # A torch brings the Triton that it was made for.
    Cell("old-torch", "3.11", (("torch", OLDEST), ("transformers", NEWEST), ("triton", OLDEST)), _OLD_TRITON),
    Cell("old-transformers", "3.11", (("torch", NEWEST), ("transformers", OLDEST), ("triton", NEWEST))),
    Cell("newest-python3.12", "3.12", _all(NEWEST)),
    Cell("newest-python3.13", "3.13", _all(NEWEST)),
    Cell("newest-python3.14", "3.14", _all(NEWEST)),
)


@dataclass(frozen=True)
class Ignored:
    """A deprecation that is not ours to mend: its category, how its text begins, and why."""

    category: str
    begins: str
    why: str


IGNORED = (
    Ignored(
        "FutureWarning", "`past_key_values` is deprecated",
        "tests call models as users do, by the name that all versions take; the library takes the version's own",
    ),
    Ignored(
        "FutureWarning", "`gradient_checkpointing_enable` is deprecated",
        "its newer name is of transformers 5.24, and there until 6 is the older one for all versions",
    ),
    Ignored("DeprecationWarning", "`torch.jit.script_method` is deprecated", "torch 2.11 gives it to its own compiler"),
    Ignored("DeprecationWarning", "_compile flag on create_block_mask", "transformers gives it, for flex attention"),
    Ignored(
        "DeprecationWarning", "Conversion of an array with ndim > 0 to a scalar", "Triton 3.6 in its interpreter"
    ),
)  # fmt: skip


def declared(source: str) -> list[str]:
    """``install_requires`` of setup.py's text."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.keyword) and node.arg == "install_requires":
            return ast.literal_eval(node.value)
    raise ValueError("setup.py: no install_requires")


def requirements(cell: Cell, wanted: Sequence[str]) -> list[str]:
    """What pip is asked for: what setup.py declares, and the floors of what the cell has the oldest of.

    Args:
        wanted: as ``declared`` gives it.
    """
    found = list(wanted)
    for name, age in cell.versions:
        floors = [re.match(rf"{name}>=([\d.]+)", line) for line in wanted]
        (floor,) = [match[1] for match in floors if match]
        if age == OLDEST:
            found.append(f"{name}=={'.'.join(floor.split('.')[:2])}.*")  # 5.10.2 is a floor of the series 5.10
    return [*found, *TEST_TOOLS, *cell.more]


def warning_filters() -> list[str]:
    """As ``-W`` and PYTHONWARNINGS take them; the later ones count."""
    errors = [f"error::{category}" for category in DEPRECATIONS]
    return errors + [f"ignore:{ignored.begins}:{ignored.category}" for ignored in IGNORED]


def interpreter(version: str) -> Path | None:
    """An interpreter of that version, by PATH or from pyenv or uv; None: there is none."""
    homes = [Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"]
    homes += [Path.home() / ".local/share/uv/python"]
    places = [shutil.which(f"python{version}"), sys.executable]
    places += [str(path) for home in homes for path in sorted(home.glob(f"*{version}.*/bin/python{version}"))]
    for place in filter(None, places):
        code = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"
        try:  # a shim is on PATH for versions that it will not start
            done = subprocess.run([place, "-c", code], capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired):
            continue
        if done.returncode == 0 and done.stdout.strip() == version:
            return Path(place)
    return None


class Night:
    """The cells, one after another.

    Args:
        place: of their environments, and of what their tests print: ``CELL/tests.log``.
        tests: paths.
        keep: leave the environments.
        timeout: seconds that the tests of a cell may take.
    """

    def __init__(self, place: Path, tests: Sequence[str], keep: bool, timeout: float = 2 * 3600):
        self.place, self.tests, self.keep, self.timeout = place, tests, keep, timeout

    def cell(self, cell: Cell, python: Path) -> str:
        """Install a cell and run its tests; what was installed, and the tests' last line."""
        place = self.place / cell.name
        place.mkdir(parents=True, exist_ok=True)
        try:
            own = make_environment(place / "venv", python)
            wanted = requirements(cell, declared((ROOT / "setup.py").read_text(encoding="utf-8")))
            install(own, *wanted, cwd=place)
            versions = self._versions(own, place)
            try:
                return f"{versions}: {self._test(own, place)}"
            except StepFailed as failure:
                raise StepFailed(f"{versions}: {failure}") from failure
        finally:
            if not self.keep:
                shutil.rmtree(place / "venv", ignore_errors=True)

    def _versions(self, python: Path, place: Path) -> str:
        names = [*PINNED, "numpy", "numba"]
        code = f"import importlib.metadata as m, json; print(json.dumps([(n, m.version(n)) for n in {names}]))"
        return ", ".join(f"{name} {version}" for name, version in json.loads(run(python, "-c", code, cwd=place)))

    def _test(self, python: Path, place: Path) -> str:
        filters = warning_filters()
        env = clean_environment(
            PYTHONPATH=os.pathsep.join((str(ROOT), str(ROOT / "kernels"))),
            PYTHONWARNINGS=",".join(filters),  # for the processes that tests start
            NUMBA_CACHE_DIR=str(place / "numba"),
            TRITON_CACHE_DIR=str(place / "triton"),
        )
        flags = [part for text in filters for part in ("-W", text)]
        command = (python, "-m", "pytest", "-q", "-n", "0", "-m", "not gpu and not soak and not thorough", *flags)
        report = place / "report.xml"
        report.unlink(missing_ok=True)
        said = run_logged(
            *command, "-p", "no:cacheprovider", f"--junit-xml={report}", *self.tests,
            cwd=ROOT, env=env, log=place / "tests.log", timeout=self.timeout,
            say=lambda text: print(f"{place.name}: {text}", flush=True),
        )  # fmt: skip
        ends = [line.strip("= ") for line in said.splitlines() if re.search(r"\b\d+ \w+.* in \d", line)]
        if not ends or not re.search(r"\b[1-9]\d* passed", ends[-1]):
            raise StepFailed(f"no test was run: {(ends or said.splitlines() or [''])[-1]}")
        return ends[-1]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    names = [cell.name for cell in CELLS]
    parser = argparse.ArgumentParser(prog="python -m release.nightly", description=__doc__.partition("\n")[0])
    parser.add_argument("cells", nargs="*", metavar="CELL", help=f"of {', '.join(names)} (all)")
    parser.add_argument("--place", type=Path, default=ROOT / "build/nightly", help="for environments (build/nightly)")
    parser.add_argument("--tests", nargs="+", default=TESTS, metavar="PATH", help="instead of the chosen ones")
    parser.add_argument("--keep", action="store_true", help="leave the environments")
    given = parser.parse_args(arguments)
    for name in given.cells:
        if name not in names:
            parser.error(f"CELL: got {name!r}, allowed {', '.join(names)}")
    night, steps = Night(given.place.resolve(), given.tests, given.keep), Steps()
    for cell in CELLS:
        if not given.cells or cell.name in given.cells:
            python = interpreter(cell.python)
            if python is None:
                steps.skip(cell.name, f"no interpreter: Python {cell.python}")
            else:
                steps.run(cell.name, lambda cell=cell, python=python: night.cell(cell, python))
    print(f"\n{table_of(steps.rows)}")
    return status(steps)


def status(steps: Steps) -> int:
    """The exit status of these rows."""
    outcomes = {row.outcome for row in steps.rows}
    return 1 if FAILED in outcomes else 3 if NOT_RUN in outcomes or PASSED not in outcomes else 0


if __name__ == "__main__":
    sys.exit(main())
