"""Steps that are timed and may fail, commands, environments, and the table at the end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PASSED, FAILED, NOT_RUN = "passed", "FAILED", "not run"
_SHOWN = 4000  # characters of a failed command's output
# What would bring this checkout, or a caller's environment, into an environment that is to stand alone, and what would
# leave out assertions or tests.
_FOREIGN = (
    "PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "PYTHONWARNINGS", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__",
    "PYTHONOPTIMIZE", "PYTEST_ADDOPTS", "PYTEST_PLUGINS",
)  # fmt: skip


class StepFailed(Exception):
    """A step's finding; its text is what the table and the log say."""


@dataclass(frozen=True)
class Row:
    """A step that is over: its name, one of PASSED, FAILED and NOT_RUN, seconds, and what was found."""

    name: str
    outcome: str
    seconds: float
    found: str


def clean_environment(**more: str) -> dict[str, str]:
    """This process's environment without what leads Python elsewhere, and with ``more``."""
    return {name: value for name, value in os.environ.items() if name not in _FOREIGN} | more


def run(
    *command: str | Path, cwd: Path, env: Mapping[str, str] | None = None, timeout: float = 3600, umask: int = -1
) -> str:
    """What a command prints to its standard output.

    Args:
        command: the program and its arguments.
        cwd: where it runs.
        env: its environment; None: ``clean_environment()``.
        timeout: seconds that it may take.
        umask: of its files; -1: as this process's.

    Raises:
        StepFailed: it cannot be started, takes too long, or ends with another status than 0; with the end of what it
            printed.
    """
    words = [str(part) for part in command]
    try:
        done = subprocess.run(
            words,
            cwd=cwd,
            env=dict(clean_environment() if env is None else env),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            umask=umask,
        )
    except subprocess.TimeoutExpired as error:
        raise StepFailed(f"{_named(words)}: not done after {timeout:.0f} s") from error
    except OSError as error:
        raise StepFailed(f"{_named(words)}: {error}") from error
    if done.returncode:
        raise StepFailed(f"{_named(words)}: exit status {done.returncode}\n{(done.stdout + done.stderr)[-_SHOWN:]}")
    return done.stdout


def run_logged(
    *command: str | Path,
    cwd: Path,
    env: Mapping[str, str],
    log: Path,
    say: Callable[[str], None],
    every: float = 60,
    timeout: float = 3600,
) -> str:
    """As ``run``, of a command that takes long: what it prints goes into ``log`` while it runs, standard error too.

    Args:
        say: is told where the log is, and every ``every`` seconds how long it has taken and the log's last line.

    Returns:
        What is in the log.

    Raises:
        StepFailed: as of ``run``; after ``timeout`` seconds its children end with it.
    """
    words = [str(part) for part in command]
    say(f"{_named(words)}: output in {log}")
    began = time.monotonic()
    with open(log, "wb") as file:
        try:
            made = subprocess.Popen(
                words, cwd=cwd, env=dict(env), stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise StepFailed(f"{_named(words)}: {error}") from error
        try:
            while made.poll() is None:
                left = timeout - (time.monotonic() - began)
                if left <= 0:
                    raise StepFailed(f"{_named(words)}: not done after {timeout:.0f} s\n{_text(log)[-_SHOWN:]}")
                with contextlib.suppress(subprocess.TimeoutExpired):
                    made.wait(min(every, left))
                    break
                say(f"{_named(words)}: {time.monotonic() - began:.0f} s: {(_text(log).splitlines() or [''])[-1][:120]}")
        finally:  # Ctrl-C, too
            if made.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(made.pid, signal.SIGKILL)
                made.wait()
    if made.returncode:
        raise StepFailed(f"{_named(words)}: exit status {made.returncode}\n{_text(log)[-_SHOWN:]}")
    return _text(log)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _named(words: Sequence[str]) -> str:
    return " ".join([Path(words[0]).name, *words[1:4]]) + " …" * (len(words) > 4)


class Steps:
    """Runs steps one after another, each only if those that it needs have passed."""

    def __init__(self, say: Callable[[str], None] = lambda text: print(text, flush=True)):
        self.rows: list[Row] = []
        self._say = say

    def run(self, name: str, step: Callable[[], str], needs: Sequence[str] = ()) -> bool:
        """Run a step, whose text is what it has found; whether it passed.

        Args:
            name: of the row.
            step: raises StepFailed for a finding that the release has to wait for.
            needs: names of steps; if one of them has not passed this one is not run.
        """
        missing = [need for need in needs if self.outcome_of(need) != PASSED]
        if missing:
            self.skip(name, f"needs {', '.join(missing)}")
            return False
        began = time.monotonic()
        try:
            outcome, found = PASSED, step()
        except StepFailed as failure:
            outcome, found = FAILED, str(failure)
        except Exception as error:  # of a check itself, such as JSON that is none: the other rows are told all the same
            outcome, found = FAILED, f"{type(error).__name__}: {error}"
        self._end(Row(name, outcome, time.monotonic() - began, found))
        return outcome == PASSED

    def skip(self, name: str, reason: str) -> None:
        """Note a step that cannot be run, which is not a step that has passed."""
        self._end(Row(name, NOT_RUN, 0.0, reason))

    def outcome_of(self, name: str) -> str | None:
        """Of the step of that name; None: there was none yet."""
        return next((row.outcome for row in self.rows if row.name == name), None)

    @property
    def passed(self) -> bool:
        """Whether there were steps, and every one of them has passed."""
        return bool(self.rows) and all(row.outcome == PASSED for row in self.rows)

    def _end(self, row: Row) -> None:
        self.rows.append(row)
        self._say(f"{row.outcome:8}{row.seconds:7.1f} s  {row.name}: {row.found}")


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table: of what was found, the first line and, of a failure, the last one."""
    lines = ["| step | | seconds | found |", "|---|---|---:|---|"]
    for row in rows:
        said = [line for line in row.found.splitlines() if line.strip()] or [""]
        found = "; ".join(dict.fromkeys((said[0], said[-1]))).replace("|", "\\|")
        lines.append(f"| {row.name} | {row.outcome} | {row.seconds:.1f} | {found} |")
    return "\n".join(lines)


def make_environment(place: Path, python: str | Path = sys.executable) -> Path:
    """A new virtual environment at ``place``; its interpreter."""
    run(python, "-m", "venv", "--clear", place, cwd=place.parent)
    return place / "bin" / "python"


def install(python: Path, *what: str | Path, constraints: Path | None = None, cwd: Path | None = None) -> None:
    """pip install into ``python``'s environment; pip's own settings say from where."""
    limits = () if constraints is None else ("-c", constraints)
    command = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *limits, *what)
    run(*command, cwd=cwd or python.parent)
