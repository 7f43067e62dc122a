"""What was found: each input ended in an error of another kind, in one of any length, or did not end."""

import asyncio
import contextlib
import io
import json
import re

import pytest
from eval_targets import _Says
from files_targets import LAYOUT, ROW
from places import DATA, written
from targets import TARGETS, attempt

from deltamem_fast.adapter import released_file
from deltamem_fast.adapter.fingerprints import public_label
from deltamem_fast.errors import ArgumentError, FileFormatError
from deltamem_fast.eval.data import Question
from deltamem_fast.eval.harness_options import checked_telling
from deltamem_fast.eval.judge import KINDS, NO_VERDICT, Endpoint, judge
from deltamem_fast.eval.movies import recall_at_5
from deltamem_fast.eval.plan import Plan
from deltamem_fast.eval.policies import Policy
from deltamem_fast.eval.records import read_records
from deltamem_fast.eval.run import _is_scored
from deltamem_fast.serving.guard import Guard
from deltamem_fast.serving.metrics import Metrics
from deltamem_fast.storage.bank_store import BankStore
from deltamem_fast.storage.files import MOST_JSON_DEPTH, parse_json
from deltamem_fast.text.settings import MOST_DEPTH
from deltamem_fast.training.log import draw_curves

HUGE, LONG, SHAPE = "1" + "0" * 400, "9" * 4300, '"shape": ['


def changed(name, old, new):
    """The first seed of a target with one text in it replaced."""
    seed = TARGETS[name].seeds()[0]
    assert old.encode() in seed
    return seed.replace(old.encode(), new.encode(), 1)


def said(name, data):
    """The error of ours that an input ends in."""
    error = attempt(TARGETS[name], data)
    assert error is not None
    return str(error)


FOUND = {
    # integers beyond floats, beyond 64 bits, and of more digits than Python says
    "a header's size": ("tensors", lambda: header(f'[0, {LONG}]'), "entry 'a'"),
    "an answer's cost": ("answers", lambda: changed("answers", '"context_tokens": 3', f'"context_tokens": {HUGE}'),
                         "context_tokens: got .*, allowed an integer, 0 or more, of 64 bits"),
    "an answer's time": ("answers", lambda: changed("answers", '"tell_seconds": 0.5', f'"tell_seconds": {HUGE}'),
                         "tell_seconds: got"),
    "a kept score": ("kept-scores", lambda: changed("kept-scores", "0.5", HUGE), "'score': got .*, allowed 0 to 1"),
    "a kept score of 5": ("kept-scores", lambda: changed("kept-scores", "0.5", "5"), "'score': got 5, allowed 0 to 1"),
    "a policy": ("policy", lambda: b"last-" + b"9" * 5000, "policy: got .*, allowed nothing"),
    "a category": ("locomo", lambda: changed("locomo", '"category": 1', f'"category": {LONG}'), "category: got"),
    "a count of versions": ("bank-cells", lambda: b'[["meta", "value", 4, 9223372036854775807]]', "count of versions"),
    # other types
    "key points": ("agent-bench", lambda: key_points(5), "metadata.keypoints: got a int, allowed a list"),
    "a date that is no text": ("longmemeval", lambda: dates(3), "'haystack_dates': got a int, allowed str"),
    "tasks of a run": ("run-record", lambda: run(tasks=["locomo"]), "tasks: got .*, allowed an object of texts"),
    "policies of a run": ("run-record", lambda: run(policies=[["nothing"]]), "policies: got .*, allowed a list"),
    "rows left out": ("run-record", lambda: run(left_out={"locomo": 1}), "left_out: got .*, allowed rows and reasons"),
    "rows verified": ("run-record", lambda: run(verified={"locomo": {"nothing": {}}}), "verified: got"),
    "a state": ("vllm-arguments", lambda: b'{"delta_mem_state": [1]}', "delta_mem_state: got .*, allowed a string"),
    "a key": ("vllm-arguments", lambda: b'{"delta_mem_key": 1.5}', "delta_mem_key: got 1.5, allowed a string"),
    # depth
    "depth": ("json", lambda: nested(MOST_JSON_DEPTH), "nested too deeply"),
    "a title": ("report", lambda: changed("report", '"LoCoMo"', "[" * 600 + "]" * 600), "nested too deeply"),
    # names that are no paths, and texts of any length
    "a task's name": ("report", lambda: changed("report", '{"locomo": "', f'{{"{LONG}": "'), "tasks: got"),
    "an option of a run": ("training-run", lambda: changed("training-run", '"rank"', f'"{LONG}"'), "holds a run with"),
    "a dtype": ("memory-head", lambda: changed("memory-head", '"F32"', f'"{LONG}"'), "allowed F32"),
    "a shape": ("memory-head", lambda: changed("memory-head", SHAPE, SHAPE + "1, " * 3000), "allowed F32"),
    "a name without a checksum": ("bank-index", lambda: index(LONG), "has no sha256"),
    "a conversation's name": ("locomo", lambda: unasked(LONG), "has no session or no question"),
    "a setting of a run": ("run-record", lambda: run(settings={LONG: 1}), "settings.9+: got"),
}  # fmt: skip


def header(offsets):
    head = f'{{"a": {{"dtype": "F32", "shape": [1], "data_offsets": {offsets}}}}}'.encode()
    return len(head).to_bytes(8, "little") + head


def index(name):
    found = json.loads(TARGETS["bank-index"].seeds()[0])
    found["files"][0] = {"file": name, "ids": ["ada"]}
    return json.dumps(found).encode()


def key_points(value):
    row = next(
        row for row in json.loads((DATA / "agent_bench.json").read_text()) if "infbench" in row["metadata"]["source"]
    )
    row["metadata"]["keypoints"] = value
    return json.dumps([row]).encode()


def unasked(name):
    rows = json.loads(TARGETS["locomo"].seeds()[0])
    return json.dumps([rows[0] | {"sample_id": name, "qa": []}]).encode()


def dates(value):
    rows = json.loads(TARGETS["longmemeval"].seeds()[0])
    rows[0]["haystack_dates"][0] = value
    return json.dumps(rows).encode()


def run(**changes):
    found = json.loads(TARGETS["run-record"].seeds()[0])
    settings = found["settings"] | changes.pop("settings", {})
    return json.dumps(found | {"settings": settings} | changes).encode()


def nested(depth):
    return b'{"a": ' + b"[" * depth + b"]" * depth + b"}"


@pytest.mark.parametrize("what", FOUND)
def test_it_is_refused(what):
    name, data, text = FOUND[what]
    found = said(name, data())
    assert re.search(text, found) and len(found) < 2000


def test_json_of_any_allowed_depth_is_read():
    assert MOST_JSON_DEPTH > MOST_DEPTH + 8  # of a session's messages and settings, within its manifest
    assert attempt(TARGETS["json"], nested(MOST_JSON_DEPTH - 1)) is None
    with pytest.raises(FileFormatError, match="nested too deeply"):
        parse_json(nested(MOST_JSON_DEPTH), "x")


@pytest.mark.parametrize("reply", (f'{{"fluency": {HUGE}}}', '{"fluency": ' + "[" * 3000 + "}"), ids=("huge", "deep"))
def test_a_judges_reply(reply):
    question = Question("q", "?", ("a",), more={"judge": KINDS[-1], "key_points": ["one"]})
    with _Says(reply):
        assert judge(question, "x", Endpoint("http://127.0.0.1:9/v1", "judge")) == NO_VERDICT


def test_a_title_as_long_as_a_book():
    known = ["http://x/Iron_Man_(2008_film)", "http://x/Heat", "http://x/" + "b" * 4000]
    assert recall_at_5("1. " + "Heat " * 1000, known[1:2], known) in (0, 1)
    assert recall_at_5("1. Heatt", known[1:2], known) == 1


def test_text_of_a_table_that_is_no_utf_8():
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    made = io.BytesIO()
    parquet.write_table(pyarrow.table({"a": ["a text"]}), made, compression="none", use_dictionary=False)
    with pytest.raises(FileFormatError, match="not a parquet file"):
        read_records(written(made.getvalue().replace(b"a text", b"\xff text"), "t.parquet"), "data")


@pytest.mark.parametrize(
    "name",
    ("~nobody-here/..", "\0/..", "\ud800/..", "a/" + "b" * 5000, "~nobody-here/../~"),
    ids=("home", "nul", "surrogate", "long", "tilde"),
)
def test_names_that_are_no_paths(name):
    assert isinstance(public_label(name), str)


@pytest.mark.parametrize(
    "more", ({"mean_beta": 5}, {}, {"mean_beta": [0.5], "answer_loss": "much"}, {"mean_beta": [0.5], "step": 10**400})
)
def test_a_log_that_is_of_no_run(more, tmp_path):
    (tmp_path / "log.jsonl").write_text(json.dumps({"step": 1, "loss": 0.5, **more}) + "\n")
    with pytest.raises(FileFormatError, match="its entries are not those of a run"):
        draw_curves(tmp_path / "log.jsonl", tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_digits_without_end():
    with pytest.raises(ArgumentError, match="window: got"):
        checked_telling("9" * 5000, 1, 1, None)
    assert checked_telling("12", "1", 1, None)["window"] == 12


def test_a_tensor_of_many_sizes():
    storage = released_file._Storage("torch FloatStorage", "data/0", 1)
    rebuild = released_file._Global("torch._utils _rebuild_tensor_v2")
    released_file._call(rebuild, (storage, 0, (1,) * 64, (1,) * 64))
    with pytest.raises(released_file._Broken):
        released_file._call(rebuild, (storage, 0, (1,) * 65, (1,) * 65))


def test_a_body_whose_length_has_many_digits():
    sent = []

    async def send(message):
        sent.append(message)

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json"), (b"content-length", b"9" * 5000)]
    scope = {"type": "http", "method": "POST", "path": "/v1/forget", "headers": headers}
    asyncio.run(Guard(None, None, 1000, Metrics())(scope, None, send))
    assert sent[0]["status"] == 413


def test_scores_of_a_row_that_are_a_list():
    path = written(b'{"scores": [1], "judge": "j"}', "scored/scores/locomo/nothing.json")
    plan = Plan("tiny", path.parents[2], (("locomo", None),), (Policy("nothing"),), judge="j")
    assert not _is_scored(plan, "locomo", "nothing", ["a"])


def test_a_bank_whose_keys_have_ended_is_left_as_it_was(tmp_path):
    """The row that could be written is not either."""
    with contextlib.closing(BankStore(tmp_path / "a.bank", LAYOUT, ROW, durable=False)) as store:
        store.write(["a"], [0], [bytes(ROW)])
        with store._file.transaction() as connection:
            connection.execute("UPDATE states SET key = ?", (2**63 - 1,))
        with pytest.raises(FileFormatError, match="other keys"):
            store.write(["b"], [0], [bytes(ROW)])
        assert store.versions(["b"]) == [0]
