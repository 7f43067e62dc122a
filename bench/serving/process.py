"""``deltamem serve`` as a process of its own: started, ended, killed."""

from __future__ import annotations

import argparse
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
        threading.Thread(target=self._read, args=(lines,), daemon=True).start()
        try:
            line = lines.get(timeout=patience)
        except queue.Empty:
            line = ""
        if not line:
            self.kill()
            raise OSError("the server has not begun; what it says on stderr is above")
        self.address = line.split(" at ")[1].split("/v1")[0]

    def _read(self, lines: queue.Queue[str]) -> None:
        # Others' warnings may stand in front; and what is not read would fill the pipe.
        for line in self._process.stdout:
            if " at http://" in line:
                lines.put(line)
        lines.put("")

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *exception) -> None:
        if self._process.poll() is None:
            self.kill()

    def kill(self) -> None:
        """SIGKILL: nothing is flushed, nobody is told."""
        self._process.kill()
        self._process.wait()

    def end(self) -> int:
        """SIGTERM; its exit status."""
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(timeout=60)


def add_engine(parser: argparse.ArgumentParser) -> None:
    """Add what chooses a server's engine."""
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers")
    parser.add_argument("--engine-args", metavar="JSON", help="of vLLM's engine")


def engine_of(options: argparse.Namespace) -> list[str]:
    """Those arguments of ``deltamem serve``."""
    more = [] if options.engine_args is None else ["--engine-args", options.engine_args]
    return ["--engine", options.engine, *more]


def named(options: argparse.Namespace) -> str:
    """What a result calls the server."""
    return "deltamem serve" + (" on vLLM" if options.engine == "vllm" else "")
