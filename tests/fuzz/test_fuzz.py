"""Whatever is read from outside: a value, or an error of ours; in bounded memory; nothing half done.

12,000 inputs and more: drawn by hypothesis, nested at many depths, and the kept ones of ``corpus``.
"""

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from limits import bounded
from mutations import NASTY, mutated, replaced
from places import Target
from targets import TARGETS, attempt

from deltamem_fast.errors import ArgumentError, DeltaMemError, FileFormatError

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NUMBER = st.integers(0, 2**32 - 1)
OPERATIONS = st.lists(st.tuples(st.integers(0, 255), NUMBER, NUMBER), min_size=1, max_size=4)
RAW = st.binary(max_size=64) | st.text(max_size=64).map(lambda text: text.encode("utf-8", "surrogatepass"))


def test_a_table_of_ten_thousand():
    assert sum(target.examples for target in TARGETS.values()) >= 10_000


@pytest.mark.parametrize("name", TARGETS)
def test_whatever_is_drawn(name):
    target = TARGETS[name]
    seeds = target.seeds()
    for seed in seeds:
        attempt(target, seed)

    @settings(
        max_examples=target.examples, deadline=None, database=None, derandomize=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(which=st.integers(0, 15), operations=OPERATIONS, raw=RAW)
    def whatever(which, operations, raw):
        attempt(target, mutated(seeds[which % len(seeds)], target.form, operations, seeds) if which else raw)

    with bounded():
        whatever()


@pytest.mark.parametrize("name", [name for name, target in TARGETS.items() if target.form in ("json", "lines", "head")])
def test_at_every_depth(name):
    """Python reads JSON almost as deep as its stack goes, and some calls further in can go through it no more."""
    target = TARGETS[name]
    seed = target.seeds()[0]
    with bounded():
        for place, depth in enumerate(range(20, 1000, 19)):
            nested = ("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth)[place % 2]
            attempt(target, replaced(seed, target.form, place * 7919, nested))


@pytest.mark.parametrize("name", TARGETS)
def test_the_kept_inputs(name):
    kept = sorted((HERE / "corpus" / name).glob("*"))
    assert kept, "no input is kept"
    target = TARGETS[name]
    target.seeds()
    with bounded():
        for path in kept:
            attempt(target, path.read_bytes())


def test_the_kept_inputs_are_few_and_small():
    kept = [path for path in (HERE / "corpus").rglob("*") if path.is_file()]
    assert {path.parent.name for path in kept} == set(TARGETS)
    assert sum(path.stat().st_size for path in kept) < 300_000


# --- that it would be seen


def _reads(run, name="json"):
    return Target(name, "x:y", run, lambda: [b"{}"], "json", 20)


def _hiding(data):
    try:
        return numpy.empty(2**31, numpy.uint8)
    except MemoryError as error:
        raise FileFormatError("x: damaged") from error


@pytest.mark.parametrize(
    "run",
    (
        lambda data: {}["key"],
        lambda data: data.decode("ascii"),
        lambda data: numpy.empty(2**31, numpy.uint8),
        _hiding,
        lambda data: (_ for _ in ()).throw(RecursionError()),
        lambda data: (_ for _ in ()).throw(ArgumentError(f"x: got {'a' * 5000}")),
        lambda data: (_ for _ in ()).throw(ValueError("plain")),
    ),
    ids=("key", "unicode", "memory", "memory, hidden", "recursion", "long", "value"),
)
def test_a_fault_is_seen(run):
    with pytest.raises(Exception) as caught, bounded():
        attempt(_reads(run), "é".encode())
    assert not isinstance(caught.value, DeltaMemError)


def test_memory_that_is_held_is_seen():
    held = []
    with pytest.raises(AssertionError, match="small inputs took"), bounded():
        attempt(_reads(lambda data: held.append(numpy.ones(2**29, numpy.uint8))), b"")


@pytest.mark.parametrize("form", ("json", "lines", "head", "text", "bytes"))
def test_mutations_change_and_never_fail(form):
    seed = b'{"a": [1, {"b": "c"}], "d": 1.5}\n{"e": null}\n\xff\x00'
    found = {mutated(seed, form, [(kind, 7919 * kind, 31 * kind)] * 2, [b"[1]"]) for kind in range(256)}
    assert len(found) > 100 and b"" not in found - {b""}


def test_nasty_values_get_behind_the_structure():
    values = [json.loads(replaced(b'{"a": {"b": 1}}', "json", place, NASTY[1])) for place in range(2)]
    assert values == [{"a": True}, {"a": {"b": True}}]


# --- that the table is whole

READERS = {"loads", "read_json", "parse_json", "read_bytes", "read_text", "read_tensors", "parse_tensors", "ZipFile"}
# What reads by the others, or what none outside has written, each with the reason.
COVERED = {
    "deltamem_fast.adapter.identity": "memory-head: backbone_fields of a file's metadata; pickles are our own",
    "deltamem_fast.chat.commands": "command, text-file",
    "deltamem_fast.cli.eval": "typed",
    "deltamem_fast.eval.agent_bench": "entities",
    "deltamem_fast.eval.costs": "/proc",
    "deltamem_fast.eval.record": "run-record",
    "deltamem_fast.eval.run": "run-record",
    "deltamem_fast.inspection.page": "its own template",
    "deltamem_fast.memory.file": "memory-head",
    "deltamem_fast.storage.bank_schema": "bank-cells",
    "deltamem_fast.vllm.serve": "typed, as cli.eval",
    "deltamem_fast.serving.app": "http",
    "deltamem_fast.session.saving": "session-content",
}


def test_whatever_reads_is_in_the_table():
    found = set()
    for path in (ROOT / "deltamem_fast").rglob("*.py"):
        calls = (node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
        if READERS & {getattr(call, "attr", getattr(call, "id", "")) for call in calls}:
            found.add(".".join(path.relative_to(ROOT).with_suffix("").parts))
    known = {target.reads.partition(":")[0] for target in TARGETS.values()} | COVERED.keys()
    assert found - known == set(), "a reader without a target"


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_read_is_there(name):
    module, _, function = TARGETS[name].reads.partition(":")
    found = importlib.import_module(module)
    for part in function.split("."):
        found = getattr(found, part)
    assert callable(found)


# --- guided by coverage


@pytest.mark.soak
def test_a_million_guided_by_coverage(tmp_path):
    assert importlib.util.find_spec("atheris") is not None, "pip install atheris"
    output = tmp_path / "found.json"
    command = [sys.executable, "-m", "tests.fuzz.atheris_run", "--runs", "1000000", "--output", str(output)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    found = json.loads(output.read_text())
    assert sum(row["inputs"] for row in found["targets"]) >= 1_000_000
    assert not any(row["crashes"] for row in found["targets"])
