"""A judge behind an endpoint: what it is asked, how its reply is read, what fails, and what is kept."""

import json
import os
import sys
import threading
import traceback
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

import deltamem_fast
from deltamem_fast.cli.main import main
from deltamem_fast.errors import ArgumentError, FileFormatError, MissingPackageError, StateError
from deltamem_fast.eval import judge as judges
from deltamem_fast.eval.data import Question
from deltamem_fast.eval.judge import KINDS, Endpoint, judge, keeping
from deltamem_fast.eval.longmemeval import load
from deltamem_fast.storage.locks import lock_at_once


def asked(kind="multi-session", **more):
    return Question("q", "Instructions. How many?", ("five", "5"), kind, "How many?", {"judge": kind, **more})


@pytest.fixture
def server():
    """An endpoint that replies with what is in ``replies``, a text or (status, body), and keeps what it is asked."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            made.asked.append((self.path, self.headers["Authorization"], body))
            reply = made.replies.pop(0) if len(made.replies) > 1 else made.replies[0]
            choices = [{"index": 0, "finish_reason": made.end, "message": {"role": "assistant", "content": reply}}]
            whole = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": choices}
            status, body = reply if isinstance(reply, tuple) else (200, json.dumps(whole))
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("retry-after-ms", "1")
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *arguments):
            pass

    made = HTTPServer(("127.0.0.1", 0), Handler)
    made.asked, made.replies, made.end = [], ["yes"], "stop"
    made.endpoint = Endpoint(f"http://127.0.0.1:{made.server_port}/v1", "the-judge", seconds=5, retries=1)
    thread = threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.mark.parametrize(
    ("reply", "expected"),
    (
        ("yes", 1), ("Yes.", 1), ("no", 0), ("**No**", 0), ("No, it is not; yes would be wrong.", 0),
        ("<think>no, or yes?</think>\nYes", 1), ("There is no mention of that… </think> yes", 1),
        ("<think>a</think> no <think>b</think> yes", 1), ("**Verdict:** Yes", 1), ("Final answer: no.", 0),
        ("The answer is yes.", 1), ("It says five, as wanted.\n\nYes", 1), ("Yes, there is no mistake.", 1),
        ("It is wrong.\nVerdict: **no**", 0), ("\\boxed{yes}", 1), ("Yes it is.", 1),
    ),
)  # fmt: skip
def test_verdicts(server, reply, expected):
    server.replies = [reply]
    assert judge(asked(), "There are five.", server.endpoint) == expected


@pytest.mark.parametrize(
    "reply",
    (
        "Partially correct.", "perhaps", "", " \n", "<think> Okay, no", "<think>a</think> <think> yes",
        "<think>yes</think>", "No mention of five is made.", "There is no mention of it", "Yes and no.", "yes/no",
        "no or yes",
        "No.\n\nWait, it is the same.\n\nYes.", "Yes, it seems.\nFinal verdict: no", "Yesterday", "I cannot say yes.",
    ),
)  # fmt: skip
def test_a_reply_without_a_clear_verdict_gives_no_score(server, reply):
    server.replies = [reply]
    assert judge(asked(), "five", server.endpoint) == judges.NO_VERDICT
    assert len(server.asked) == 1


@pytest.mark.parametrize("reply", ("yes", "<think> Okay, no", ""))
def test_a_reply_that_was_cut_off_gives_no_score(server, reply):
    server.replies, server.end = [reply], "length"
    assert judge(asked(), "five", server.endpoint) == judges.CUT_OFF


def test_a_text_that_is_too_long_for_the_judge_stops_nothing(server):
    server.replies = [(400, '{"error": {"message": "too long", "code": "context_length_exceeded"}}')]
    assert judge(asked(), "five", server.endpoint) == judges.REFUSED


def test_what_the_judge_is_asked(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    judge(asked(), "There are {five}.", server.endpoint)
    ((path, key, body),) = server.asked
    assert path == "/v1/chat/completions" and key == "Bearer sk-secret"
    assert body["model"] == "the-judge" and body["temperature"] == 0
    text = body["messages"][0]["content"]
    assert "Question: How many?" in text and "Right answer: five or 5" in text and "answer: There are {five}." in text
    assert text.endswith("Reply with yes or no alone.")


def test_kinds_differ_in_what_is_right(server):
    for kind in KINDS[:-1]:
        judge(asked(kind), "five", server.endpoint)
    texts = dict(zip(KINDS, (body["messages"][0]["content"] for _, _, body in server.asked)))
    assert "off by one" in texts["temporal-reasoning"] and "newest" in texts["knowledge-update"]
    assert "A good answer: five" in texts["single-session-preference"] and "Reason: five" in texts["abstention"]
    assert len(set(texts.values())) == len(KINDS) - 3  # three kinds of plain questions are judged alike


def test_an_empty_answer_is_wrong_without_asking(server):
    assert judge(asked(), " \n", server.endpoint) == 0
    assert judge(asked("summary", key_points=["p"]), "", server.endpoint) == 0
    assert server.asked == []


def test_a_summary_without_key_points_has_no_score(server):
    for question in (asked("summary"), asked("summary", key_points=[])):
        assert judge(question, "A summary.", server.endpoint) == judges.NO_KEY_POINTS
    assert server.asked == []


def test_a_summary_is_fluency_times_f1(server):
    # recall 1 of 2, precision 3 of 4: 2 · ½ · ¾ / 1¼ = 0.6
    server.replies = ['{"fluency": 1}', 'Point 2 is there. {"recall": 1}', '{"precision": 3, "sentence_count": 4}']
    question = asked("summary", key_points=["A cup vanishes.", "It is found."])
    assert judge(question, "A summary.", server.endpoint) == pytest.approx(0.6)
    texts = [body["messages"][0]["content"] for _, _, body in server.asked]
    assert "1. A cup vanishes.\n2. It is found." in texts[1] and "five" in texts[2]
    server.replies = ['{"fluency": 0}', '{"recall": 2}', '{"precision": 4, "sentence_count": 4}']
    assert judge(question, "A summary.", server.endpoint) == 0
    server.replies = ['{"fluency": 1}', '{"recall": 0}', '{"precision": 0, "sentence_count": 0}']
    assert judge(question, "A summary.", server.endpoint) == 0


@pytest.mark.parametrize(
    "reply",
    ("none", "{}", '{"fluency": "x"}', '{"fluency": -1}', '{"fluency": NaN}', '<think>{"fluency": 1}',
     '{"fluency": 1}</think>'),
)  # fmt: skip
def test_a_summary_without_its_numbers_has_no_score(server, reply):
    server.replies = [reply]
    assert judge(asked("summary", key_points=["p"]), "A summary.", server.endpoint) == judges.NO_VERDICT
    assert len(server.asked) == 1


def test_what_passes_is_tried_again(server):
    server.replies = [(503, "{}"), "yes"]
    assert judge(asked(), "five", server.endpoint) == 1
    assert len(server.asked) == 2


@pytest.mark.parametrize(
    ("reply", "message", "times"),
    (
        ((500, "{}"), "500", 2),
        ((401, '{"error": {"message": "bad key"}}'), "bad key", 1),
        ((200, "no JSON"), "judge: http", 1),
        ((200, "{}"), "not a reply of OpenAI's API", 1),
        ((404, '{"error": {"message": "no such model", "code": "model_not_found"}}'), "no such model", 1),
        ((400, '{"error": {"message": "no such parameter"}}'), "no such parameter", 1),
    ),
)
def test_errors_name_the_endpoint(server, reply, message, times):
    server.replies = [reply]
    with pytest.raises(StateError, match=message) as error:
        judge(asked(), "five", server.endpoint)
    assert server.endpoint.url in str(error.value) and "\n" not in str(error.value)
    assert "answers and scores so far are kept, and the same command goes on" in str(error.value)
    assert len(server.asked) == times


def test_a_key_stands_in_no_error(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    server.replies = [(401, '{"error": {"message": "sk-secret is not known"}}')]
    with pytest.raises(StateError) as error:
        judge(asked(), "five", server.endpoint)
    assert "sk-secret" not in "".join(traceback.format_exception(error.value))
    for before in range(200):  # wherever the message is shortened
        text = judges._trouble(server.endpoint, "x" * before + "sk-secret", "sk-secret")
        assert "sk-s" not in text, before


def test_a_key_stands_in_no_error_about_a_reply_of_another_shape(server, monkeypatch):
    import openai

    def fail(*_, **__):
        raise ValueError("cannot read sk-secret")

    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    monkeypatch.setattr(openai, "OpenAI", fail)
    with pytest.raises(StateError, match="not a reply of OpenAI's API: cannot read …") as error:
        judge(asked(), "five", server.endpoint)
    assert "cannot read sk-secret" not in "".join(traceback.format_exception(error.value))


def test_nobody_there():
    with pytest.raises(StateError, match=r"judge: http://127\.0\.0\.1:9/v1: m: Connection error"):
        judge(asked(), "five", Endpoint("http://127.0.0.1:9/v1", "m", seconds=2, retries=0))


def test_scores_are_kept_and_nothing_is_judged_twice(server, tmp_path):
    path = tmp_path / "answers.judged.jsonl"
    server.replies = ["yes", "no", "yes"]
    first = keeping(server.endpoint, path)
    assert [first(asked(), "five"), first(asked(), "six"), first(asked(), "five")] == [1, 0, 1]
    again = keeping(server.endpoint, path)
    assert [again(asked(), "six"), again(asked(), "five")] == [0, 1] and len(server.asked) == 2
    assert again(asked("knowledge-update"), "six") == 1  # another kind of judgement
    keeping(Endpoint(server.endpoint.url, "another"), path)(asked(), "six")
    assert len(server.asked) == 4 and len(path.read_text().splitlines()) == 4
    assert json.loads(path.read_text().splitlines()[0])["id"] == "q"


def test_key_points_are_part_of_what_was_judged(server, tmp_path):
    server.replies = ['{"fluency": 1, "recall": 1, "precision": 1, "sentence_count": 1}']
    judged = keeping(server.endpoint, tmp_path / "kept.jsonl")
    assert judged(asked("summary", key_points=["a"]), "x") == judged(asked("summary", key_points=["a"]), "x") == 1
    assert len(server.asked) == 3
    assert judged(asked("summary", key_points=["a", "b"]), "x") == pytest.approx(2 / 3)


def test_what_got_no_score_is_asked_again(server, tmp_path):
    path = tmp_path / "kept.jsonl"
    server.replies = ["Partially correct.", "yes"]
    judged = keeping(server.endpoint, path)
    assert judged(asked(), "five") == judges.NO_VERDICT and not path.exists()
    assert judged(asked(), "five") == 1 and len(path.read_text().splitlines()) == 1


def test_the_command_scores_what_it_can_and_asks_again(server, tmp_path, capsys):
    data = Path(deltamem_fast.__file__).parent / "data/eval/longmemeval.json"
    answers = tmp_path / "answers.jsonl"
    ids = [document.questions[0].id for document in load(data)[:2]]
    answers.write_text("".join(json.dumps({"id": one, "answer": "x"}) + "\n" for one in ids))
    command = ["eval", "score", "longmemeval-s", str(answers), "--data", str(data)]
    command += ["--judge", server.endpoint.url, "--judge-model", "m"]
    server.replies = ["Partially correct.", "yes"]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["scores"] == {ids[0]: None, ids[1]: 1.0} and found["unscored_for"] == {judges.NO_VERDICT: 1}
    server.replies = ["no"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["scores"] == {ids[0]: 0.0, ids[1]: 1.0}
    assert len(server.asked) == 3
    hostile = tmp_path / "data.json"
    hostile.write_text(data.read_text(encoding="utf-8").replace(ids[0], r"\u009b31m\u001b"), encoding="utf-8")
    answers.write_text(json.dumps({"id": "\x9b31m\x1b", "answer": "x"}) + "\n")
    server.replies = ["yes"]
    assert main([*command[:4], "--data", str(hostile), *command[6:]]) == 0
    said = capsys.readouterr().out
    assert json.loads(said)["scores"] == {"\x9b31m\x1b": 1.0} and not {"\x9b", "\x1b"} & set(said)


def test_a_line_that_a_killed_process_left_is_cut_off(server, tmp_path):
    path = tmp_path / "kept.jsonl"
    keeping(server.endpoint, path)(asked(), "five")
    whole = path.read_bytes()
    torn = whole + b'{"id": "q", "sco'
    path.write_bytes(torn)
    judged = keeping(server.endpoint, path)
    assert judged(asked(), "five") == 1 and len(server.asked) == 1
    assert path.read_bytes() == torn  # another process may be writing it
    judged(asked(), "six")
    assert path.read_bytes().startswith(whole + b'{"id": "q", "score": 1.0') and path.read_bytes().count(b"\n") == 2
    path.write_bytes(whole)
    path.write_bytes(b"{damaged\n" + whole)
    with pytest.raises(FileFormatError, match=r"kept scores: .*line 1: not JSON"):
        keeping(server.endpoint, path)
    path.write_text('{"key": "k"}\n')
    with pytest.raises(FileFormatError, match="line 1: has no 'score'"):
        keeping(server.endpoint, path)


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"url": "localhost:1"}, "judge: got 'localhost:1', allowed a URL"),
        ({"url": "file:///x"}, "allowed a URL"),
        ({"model": ""}, "got an empty name"),
        ({"retries": -1}, "judge's retries: got -1"),
        ({"seconds": 0}, "judge's seconds: got 0"),
    ),
)
def test_endpoints_that_are_none(options, message):
    with pytest.raises(ArgumentError, match=message):
        Endpoint(**{"url": "http://x/v1", "model": "m", **options})


def test_a_question_of_no_kind(server):
    for question in (Question("q", "?", ("a",)), asked("other")):
        with pytest.raises(ArgumentError, match="the kind of question q: got .* allowed single-session-user"):
            judge(question, "five", server.endpoint)


def test_a_line_is_added_once_another_process_has_written_its_own(server, tmp_path):
    path = tmp_path / "kept.jsonl"
    path.write_bytes(b'{"half a li')
    judged = keeping(server.endpoint, path)
    held = os.open(path, os.O_RDWR)
    lock_at_once(held)
    thread = threading.Thread(target=judged, args=(asked(), "five"))
    thread.start()
    thread.join(0.3)
    assert thread.is_alive() and path.read_bytes() == b'{"half a li'
    os.pwrite(held, b'{"key": "k", "score": 1}\n', 0)
    os.close(held)
    thread.join(10)
    first, second = map(json.loads, path.read_text().splitlines())
    assert first == {"key": "k", "score": 1} and second["score"] == 1


def test_without_openai_the_error_says_what_to_install(server, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(MissingPackageError, match="judge: needs the package openai"):
        keeping(server.endpoint, tmp_path / "kept.jsonl")  # before anything is answered
    with pytest.raises(MissingPackageError, match="pip install openai"):
        judges.judge(asked(), "five", server.endpoint)
