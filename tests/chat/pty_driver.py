"""A command in a terminal of its own: keys go in, what is shown comes out as text without escape sequences."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import termios
import time

ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07]*\x07|\x1b[=>()][0-9A-B]?|\r")
UP, DOWN, ENTER, ALT_ENTER, TAB, CTRL_C, CTRL_D = "\x1b[A", "\x1b[B", "\r", "\x1b\r", "\t", "\x03", "\x04"


class Terminal:
    """Runs ``command``; ``with`` ends it.

    Args:
        environment: of the command.
        size: rows and columns.
    """

    def __init__(self, command: list[str], environment: dict[str, str], size: tuple[int, int] = (40, 110)):
        self.raw = ""
        self._seen = 0
        self.pid, self._handle = pty.fork()
        if self.pid == 0:
            os.execve(command[0], command, environment)
        fcntl.ioctl(self._handle, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *error) -> None:
        try:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass
        os.close(self._handle)

    def type(self, *keys: str) -> None:
        """Type keys; what is expected next must be shown after them."""
        self._read(0)
        self._seen = len(self.raw)
        for key in keys:
            os.write(self._handle, key.encode())
            time.sleep(0.05)  # an escape key by itself and the beginning of a sequence are told apart by time

    def expect(self, text: str, seconds: float = 60) -> str:
        """Wait until ``text`` is shown; all that was shown since the last keys. The next one looks behind it."""
        end = time.monotonic() + seconds
        while text not in (shown := ESCAPES.sub("", self.raw[self._seen :])):
            assert time.monotonic() < end, f"{text!r} is not in {shown!r}"
            assert self._read(0.1), f"{text!r} is not in {shown!r}, and the command has ended"
        return shown

    def end(self, seconds: float = 30) -> int:
        """The exit code."""
        end = time.monotonic() + seconds
        while self._read(0.1):
            assert time.monotonic() < end, f"still running: {self.raw[-500:]!r}"
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def _read(self, seconds: float) -> bool:
        """Read what is there, or comes in time; False at the end."""
        while select.select([self._handle], [], [], seconds)[0]:
            try:
                found = os.read(self._handle, 65536)
            except OSError:  # Linux: the other side is closed
                return False
            if not found:
                return False
            for _ in range(found.count(b"\x1b[6n")):  # where the cursor is: near the top, as far as anybody knows
                os.write(self._handle, b"\x1b[5;1R")
            self.raw += found.decode("utf-8", "replace")
            seconds = 0
        return True
