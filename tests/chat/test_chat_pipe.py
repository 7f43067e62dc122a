"""The command over a pipe, in a process of its own with a home of its own."""

import contextlib
import os
import signal
import subprocess
import sys
import time

from chat_support import ASKED, TOLD, write_tiny_model

COMMAND = [sys.executable, "-m", "deltamem_fast", "chat"]


def environment(home):
    """A fresh home, and a terminal that must not matter."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "DELTAMEM_"))}
    return kept | {"HOME": str(home), "TERM": "xterm-256color", "OMP_NUM_THREADS": "1"}


def test_a_story_over_a_pipe(tmp_path):
    lines = [
        TOLD, "The small coat is \\", "in the bakery.", ASKED, "", "/nothing", "Now the code of Corpus is 17.", ASKED,
        "/off", ASKED, "/on", "/undo", f"/forget {TOLD}", "What is love?", "/save ada", "/load ada", "/memory",
    ]  # fmt: skip
    text = "\r\n".join(lines).encode() + b"\nWhat is \xff?"
    done = subprocess.run(
        [*COMMAND, "--context-turns", "1"], input=text, capture_output=True, timeout=120, env=environment(tmp_path),
        cwd=tmp_path,
    )  # fmt: skip
    out, err = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == 1, err
    answers = out.splitlines()
    assert (answers[0], answers[2], answers[3], answers[4]) == ("42", "42", "17", "17")
    assert answers[5].startswith("Memory off") and answers[6] not in ("42", "17")
    assert "\x1b" not in out + err and "> " not in out
    errors = [line for line in err.splitlines() if "error" in line]
    assert len(errors) == 1 and errors[0].startswith("deltamem: error: /nothing: no such command")
    assert len(err.splitlines()) == 3  # two hints at words that it does not know
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ada"]  # no history


@contextlib.contextmanager
def killed_at_the_end(process):
    with process:
        try:
            yield process
        finally:
            process.kill()


def test_a_closed_pipe_and_an_interrupt(tmp_path):
    model, adapter = write_tiny_model(tmp_path)
    command = [*COMMAND, model, "--adapter", adapter, "--max-new-tokens", "100000"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    for ending in ("pipe", "interrupt"):
        with killed_at_the_end(subprocess.Popen(command, **pipes, env=environment(tmp_path))) as chat:
            chat.stdin.write(b"Tell me something.\n")
            chat.stdin.flush()
            assert chat.stdout.read(1)  # it streams
            if ending == "pipe":
                chat.stdout.close()
            else:
                time.sleep(0.1)
                chat.send_signal(signal.SIGINT)
            assert chat.wait(30) == (141 if ending == "pipe" else 130)
            assert chat.stderr.read() == b""
