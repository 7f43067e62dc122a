"""``deltamem serve`` as a process of its own: started, ended, killed."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence


class ServerProcess:
    """A server on loopback.

    Args:
        arguments: of ``deltamem serve``.
        patience: seconds that it has to begin.

    Attributes:
        address: where it listens.
    """

    def __init__(self, arguments: Sequence[str], patience: float = 180.0):
        command = [sys.executable, "-m", "deltamem_fast", "serve", *arguments, "--port", "0"]
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}
        )
        lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=lambda: lines.put(self._process.stdout.readline()), daemon=True).start()
        try:
            line = lines.get(timeout=patience)
        except queue.Empty:
            line = ""
        if " at http://" not in line:
            self.kill()
            raise OSError(f"the server has not begun: {line!r}")
        self.address = line.split(" at ")[1].split("/v1")[0]

    def kill(self) -> None:
        """SIGKILL: nothing is flushed, nobody is told."""
        self._process.kill()
        self._process.wait()

    def end(self) -> int:
        """SIGTERM; its exit status."""
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(timeout=60)
