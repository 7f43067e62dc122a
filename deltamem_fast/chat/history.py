"""The file of what was typed, kept from chat to chat, private."""

from __future__ import annotations

import os
from pathlib import Path

from ..storage.files import make_directory, naming_files

VARIABLE = "DELTAMEM_HISTORY"


def history_path() -> Path | None:
    """Where the history lies: DELTAMEM_HISTORY (empty = nowhere, None), else ``deltamem/history`` in the state home.

    The state home is XDG_STATE_HOME if that is an absolute path, else ``~/.local/state``.
    """
    chosen = os.environ.get(VARIABLE)
    if chosen is not None:
        return Path(chosen).expanduser() if chosen else None
    home = os.environ.get("XDG_STATE_HOME", "")
    state = Path(home) if os.path.isabs(home) else Path.home() / ".local" / "state"
    return state / "deltamem" / "history"


def make_private(path: Path) -> Path:
    """Make the file, or take an existing one, so that its owner alone may read it; missing directories likewise.

    Raises:
        OSError: it cannot be made, or is no file; the message names it.
    """
    with naming_files("history", path):
        return _make_private(path)


def _make_private(path: Path) -> Path:
    make_directory(path.parent)
    # Never readable by others in between: made with this mode, and only then corrected where it was there already.
    # A pipe that nobody reads is an error, not a wait.
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NONBLOCK", 0), 0o600)
    try:
        if os.name != "nt" and os.fstat(handle).st_mode & 0o077 and os.path.isfile(path):
            os.fchmod(handle, 0o600)
    finally:
        os.close(handle)
    return path
