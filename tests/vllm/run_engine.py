"""An engine in a process of its own: a job from stdin, what was generated to stdout, both JSON.

vLLM's Transformers backend changes transformers' classes, and whoever computes what is expected needs them as they are.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

MARK = "generated: "


def run(module: str, job: list) -> list:
    """What a module of this package prints for a job."""
    ran = subprocess.run(
        [sys.executable, "-m", f"tests.vllm.{module}"], input=json.dumps(job), capture_output=True, text=True,
        timeout=400, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    lines = [line for line in ran.stdout.splitlines() if line.startswith(MARK)]
    assert ran.returncode == 0 and lines, ran.stderr[-4000:] + ran.stdout[-4000:]
    return json.loads(lines[0].removeprefix(MARK))


def generated(directory: Path, architecture: str, batches: list, tokens: int, **settings) -> list:
    """What an engine in a process of its own generates greedily from batches of prompts, one after another."""
    return run("run_engine", [str(directory), architecture, batches, tokens, settings])


def main() -> None:
    from tests.vllm.engines import engine, generate

    directory, architecture, batches, tokens, settings = json.load(sys.stdin)
    with engine(Path(directory), architecture, **settings) as llm:
        found = [generate(llm, batch, tokens) for batch in batches]
    print("\n" + MARK + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
