"""Every target under atheris, which keeps an input where it reaches code that none before it has reached.

    python -m tests.fuzz.atheris_run --runs 1000000
    python -m tests.fuzz.atheris_run --target locomo --seconds 60

Each target runs in a process of its own. What is found new is kept in ``--corpus``, to begin with next time; the
smallest of it go into ``tests/fuzz/corpus`` by ``python -m tests.fuzz.keep``, and ``make test`` reads them there. An
input that ends in a fault is written beside the results, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
KEPT = HERE / "corpus"
MOST_LENGTH = 16_384  # bytes of an input
MOST_RESIDENT = 3_000  # megabytes of a target's process
LONGEST_INPUT = 20  # seconds that one may take


def main(arguments: list[str] | None = None) -> int:
    """Run targets one after the other, print a table, and write JSON."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.atheris_run", description=__doc__.split("\n")[0])
    parser.add_argument("--target", nargs="+", help="names; default: all")
    parser.add_argument("--runs", type=int, default=0, help="inputs over all targets together")
    parser.add_argument(
        "--seconds",
        type=float,
        default=0,
        help="of each target at most; what it lacks of its share then falls to those after it",
    )
    parser.add_argument("--corpus", type=Path, default=Path(tempfile.gettempdir()) / "deltamem-fuzz-corpus")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "bench/results/fuzz/fuzz.json", help="JSON of the results"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.child:
        return _fuzz(given.child)
    sys.path[:0] = [str(HERE.parent), str(HERE)]
    from targets import TARGETS

    names = given.target or list(TARGETS)
    unknown = sorted(set(names) - TARGETS.keys())
    if unknown or not (given.runs or given.seconds):
        parser.error(f"--target: got {', '.join(unknown)}" if unknown else "allowed --runs or --seconds, or both")
    rows = []
    print(f"{'target':20} {'inputs':>10} {'seconds':>8} {'kept':>6} crashes", flush=True)
    for place, name in enumerate(names):
        left = given.runs - sum(row["inputs"] for row in rows)
        share = -(-left // (len(names) - place)) if given.runs else 0
        row = _target(name, max(share, 0), given)
        rows.append(row)
        crash = row["crashes"][0][:60] if row["crashes"] else ""
        print(f"{name:20} {row['inputs']:>10,} {row['seconds']:>8.1f} {row['kept']:>6,} {crash}", flush=True)
    total = sum(row["inputs"] for row in rows)
    print(f"{'all':20} {total:>10,} {sum(row['seconds'] for row in rows):>8.1f}")
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(_facts() | {"inputs": total, "targets": rows}, indent=2) + "\n")
    return 1 if any(row["crashes"] for row in rows) else 0


def _facts() -> dict:
    import importlib.metadata
    import platform

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    versions = {name: importlib.metadata.version(name) for name in ("atheris", "torch", "transformers", "safetensors")}
    moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {"commit": commit.strip(), "time": moment, "python": platform.python_version(), "versions": versions}


def _target(name: str, runs: int, given: argparse.Namespace) -> dict:
    """Run one target: what it took, and what it found."""
    corpus, crashes = given.corpus / name, given.output.parent / "crashes" / name
    for folder in (corpus, crashes):
        folder.mkdir(parents=True, exist_ok=True)
    options = [
        f"-artifact_prefix={crashes}/", f"-max_len={MOST_LENGTH}", f"-rss_limit_mb={MOST_RESIDENT}",
        f"-seed={given.seed}", f"-timeout={LONGEST_INPUT}", "-print_final_stats=1", "-verbosity=1",
    ]  # fmt: skip
    options += [f"-runs={runs}"] if runs else []
    options += [f"-max_total_time={int(given.seconds)}"] if given.seconds else []
    began = time.monotonic()
    said = _child(name, [*options, str(corpus), *([str(KEPT / name)] if (KEPT / name).is_dir() else [])])
    seconds = time.monotonic() - began
    executed = re.findall(r"stat::number_of_executed_units: (\d+)", said) or re.findall(r"^#(\d+)", said, re.M) or ["0"]
    found = [path.name for path in crashes.iterdir()]
    lines = [line for line in said.splitlines() if re.match(r"\s*\w*(Error|Exception|ERROR)\b", line)]
    if not re.search(r"^Done \d+ runs", said, re.M) and not found:
        lines, found = [said[-1500:]], ["no end"]
    said = re.sub(r"\S*/deltamem-fuzz-\w+/", "", " | ".join(lines))[:400]  # without places of this machine
    why = [f"{path}: {said}" for path in found]
    kept = len(list(corpus.iterdir()))
    return {"target": name, "inputs": int(executed[-1]), "seconds": round(seconds, 1), "kept": kept, "crashes": why}


def _child(name: str, options: list[str]) -> str:
    command = [sys.executable, "-m", "tests.fuzz.atheris_run", "--child", name]
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
        "FUZZ_OPTIONS": json.dumps(options),
    }
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True)
    return (done.stdout + done.stderr).decode("utf-8", "replace")


def _fuzz(name: str) -> int:
    """In a process of its own: atheris's loop, which ends the process."""
    import random

    import atheris

    sys.path[:0] = [str(HERE.parent), str(HERE)]
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    with atheris.instrument_imports(include=["deltamem_fast"]):
        from targets import TARGETS, attempt

        import deltamem_fast  # noqa: F401
    from mutations import mutated

    target = TARGETS[name]
    seeds = target.seeds()
    options = json.loads(os.environ["FUZZ_OPTIONS"])
    corpus = Path(next(option for option in options if not option.startswith("-")))
    for place, seed in enumerate(seeds):
        (corpus / f"seed-{place}").write_bytes(seed)

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        """Mostly ours, which keep to the structure; sometimes libFuzzer's, which know what was compared with what."""
        chance = random.Random(seed)
        if chance.random() < 0.25:
            return atheris.Mutate(data, most)
        number = lambda: chance.randrange(2**32)  # noqa: E731
        changed = mutated(bytes(data), target.form, [(number(), number(), number())], seeds)
        return changed[:most]

    def one(data: bytes) -> None:
        attempt(target, data)

    atheris.Setup([sys.argv[0], *options], one, custom_mutator=mutate)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
