"""A judge behind an endpoint: what it is asked, how its reply is read, what fails, and what is kept."""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from deltamem_fast.errors import ArgumentError, FileFormatError, MissingPackageError, StateError
from deltamem_fast.eval import judge as judges
from deltamem_fast.eval.data import Question
from deltamem_fast.eval.judge import KINDS, Endpoint, judge, keeping


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
            choices = [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": reply}}]
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
    made.asked, made.replies = [], ["yes"]
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
        ("<think>no, or yes?</think>\nYes", 1),
    ),
)  # fmt: skip
def test_verdicts(server, reply, expected):
    server.replies = [reply]
    assert judge(asked(), "There are five.", server.endpoint) == expected


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


@pytest.mark.parametrize("reply", ("none", "{}", '{"fluency": "x"}', '{"fluency": -1}', '{"fluency": NaN}'))
def test_a_summary_without_its_numbers_is_an_error(server, reply):
    server.replies = [reply]
    with pytest.raises(StateError, match="gave no JSON with fluency"):
        judge(asked("summary", key_points=["p"]), "A summary.", server.endpoint)


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
        ("perhaps", "said neither yes nor no: 'perhaps'", 1),
        ("", "replied with nothing", 1),
    ),
)
def test_errors_name_the_endpoint(server, reply, message, times):
    server.replies = [reply]
    with pytest.raises(StateError, match=message) as error:
        judge(asked(), "five", server.endpoint)
    assert server.endpoint.url in str(error.value) and "\n" not in str(error.value)
    assert len(server.asked) == times


def test_a_key_stands_in_no_error(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    server.replies = [(401, '{"error": {"message": "sk-secret is not known"}}')]
    with pytest.raises(StateError) as error:
        judge(asked(), "five", server.endpoint)
    assert "sk-secret" not in str(error.value)


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


def test_a_line_that_a_killed_process_left_is_cut_off(server, tmp_path):
    path = tmp_path / "kept.jsonl"
    keeping(server.endpoint, path)(asked(), "five")
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"id": "q", "sco')
    assert keeping(server.endpoint, path)(asked(), "five") == 1
    assert path.read_bytes() == whole and len(server.asked) == 1
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


def test_without_openai_the_error_says_what_to_install(server, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(MissingPackageError, match="pip install openai"):
        judges.judge(asked(), "five", server.endpoint)
