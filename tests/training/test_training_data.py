"""Training data: both forms of a line, and every way in which a line can be wrong."""

import json

import pytest
from training_support import chat, write_lines

from deltamem_fast.errors import FileFormatError
from deltamem_fast.training import ExampleFiles
from deltamem_fast.training.data import parse_line


def parse(value, **options):
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return parse_line(raw, "f.jsonl:3", **options)


def texts(messages):
    return [message["content"] for message in messages]


# --- what a line means


def test_a_chat_is_cut_before_its_last_user_turn():
    (example,) = parse({"messages": chat("a", "b", "c", "d", system="s")})
    assert texts(example.write) == ["s", "a", "b"]
    assert texts(example.read) == ["s", "c"]
    assert example.answer == {"role": "assistant", "content": "d"}
    assert example.where == "f.jsonl:3"


def test_more_turns_can_be_visible():
    line = {"messages": chat("a", "b", "c", "d", "e", "f", system="s")}
    (two,) = parse(line, visible_turns=2)
    assert texts(two.write) == ["s", "a", "b"] and texts(two.read) == ["s", "c", "d", "e"]
    (all_of_them,) = parse(line, visible_turns=9)
    assert all_of_them.write == () and texts(all_of_them.read) == ["s", "a", "b", "c", "d", "e"]


def test_a_turn_goes_up_to_the_next_user_message():
    messages = [*chat("a", "b", "c"), {"role": "assistant", "tool_calls": [{"name": "f"}]},
                {"role": "tool", "content": "t"}, {"role": "assistant", "content": "d"}]  # fmt: skip
    (example,) = parse({"messages": messages})
    assert texts(example.write) == ["a", "b"]
    assert [message["role"] for message in example.read] == ["user", "assistant", "tool"]


def test_several_targets_make_several_examples():
    first, second = parse({"messages": chat("a", "b", "c", "d"), "targets": [1, 3], "id": 7})
    assert (first.write, texts(first.read), first.answer["content"]) == ((), ["a"], "b")
    assert (texts(second.write), texts(second.read), second.answer["content"]) == (["a", "b"], ["c"], "d")


def test_the_parts_can_be_spelt_out():
    (example,) = parse({"write": chat("w", "x"), "read": chat("r", "s", "t"), "answer": "u"})
    assert (texts(example.write), texts(example.read)) == (["w", "x"], ["r", "s", "t"])
    assert example.answer == {"role": "assistant", "content": "u"}
    (example,) = parse({"write": [], "read": chat("r"), "answer": {"role": "assistant", "content": "u"}})
    assert example.write == () and example.answer["content"] == "u"


def test_state_only_moves_all_but_the_last_turn_into_the_write_context():
    (example,) = parse({"messages": chat("a", "b", "c", "d", "e", "f", system="s")}, visible_turns=2)
    alone = example.state_only()
    assert (texts(alone.write), texts(alone.read)) == (["s", "a", "b", "c", "d"], ["s", "e"])
    assert alone.state_only() is alone
    (example,) = parse({"messages": chat("a", "b", "c", "d", system="s")}, visible_turns=2)
    alone = example.state_only()
    assert (texts(alone.write), texts(alone.read)) == (["s", "a", "b"], ["s", "c"])
    assert alone.answer == example.answer


# --- what is wrong with a line

MESSAGES = chat("a", "b")
WRONG = {
    "JSON": (b'{"messages": [', "not JSON: Expecting value at column 15"),
    "UTF-8": (b'{"messages": "\xff"}', "not UTF-8: invalid start byte at byte 14"),
    "an array": (["messages"], "got a JSON list, allowed an object"),
    "no known key": ({"text": "a"}, "got keys ['text'], allowed messages, or write, read and answer"),
    "an unknown key": ({"messages": MESSAGES, "mesages": 1}, "'mesages': unknown key, allowed messages, targets, id"),
    "both forms": ({"messages": MESSAGES, "answer": "a"}, "'answer': unknown key"),
    "a key twice": (b'{"messages": [], "messages": []}', "key 'messages' stands there twice"),
    "no list": ({"messages": "a"}, "messages: got str, allowed a list of messages"),
    "an empty list": ({"messages": []}, "messages: got an empty list"),
    "no object": ({"messages": ["a"]}, "messages[0]: got str, allowed an object with role and content"),
    "an unknown message key": (
        {"messages": [{"role": "user", "content": "a", "weight": 1}, *MESSAGES]},
        "messages[0]: 'weight': unknown key, allowed role, content",
    ),
    "a wrong role": (
        {"messages": [{"role": "usr", "content": "a"}, *MESSAGES]},
        "messages[0].role: got 'usr', allowed system, developer, user, assistant, tool",
    ),
    "no content": ({"messages": [{"role": "user"}, *MESSAGES]}, "messages[0].content: got None, allowed a string"),
    "a number as content": ({"messages": [{"role": "user", "content": 1}, *MESSAGES]}, "messages[0].content: got 1"),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image", "url": "u"}]}, *MESSAGES]},
        "messages[0].content: got [{'type': 'image'",
    ),
    "a user's answer": ({"messages": chat("a", "b", "c")}, "messages[2].role: got 'user', allowed assistant"),
    "an empty answer": ({"messages": chat("a", " \n")}, "messages[1].content: got an empty answer"),
    "no user": ({"messages": [{"role": "assistant", "content": "a"}]}, "got no user message before messages[0]"),
    "targets that are no list": ({"messages": MESSAGES, "targets": 1}, "targets: got 1, allowed a list"),
    "a target outside": ({"messages": MESSAGES, "targets": [2]}, "targets: got 2, allowed 0 to 1"),
    "a target that is no answer": ({"messages": MESSAGES, "targets": [0]}, "messages[0].role: got 'user'"),
    "a part missing": ({"write": MESSAGES, "read": MESSAGES}, "answer: is missing"),
    "nothing to read": ({"write": MESSAGES, "read": [], "answer": "a"}, "read: got an empty list"),
    "a read part without a user": ({"write": [], "read": MESSAGES[1:], "answer": "a"}, "read: got no user message"),
    "an answer that is no message": ({"write": [], "read": MESSAGES, "answer": 3}, "answer: got int"),
    "an empty answer in parts": ({"write": [], "read": MESSAGES, "answer": ""}, "answer.content: got an empty answer"),
    "nested without end": (b"[" * 100_000, "nested too deeply"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_line_is_named(name):
    value, message = WRONG[name]
    with pytest.raises(ValueError) as error:
        parse(value)
    assert str(error.value).startswith("f.jsonl:3: ") and message in str(error.value)


# --- files


def test_files_are_read_line_by_line(tmp_path):
    first = write_lines(tmp_path / "a.jsonl", [{"messages": chat("a", "b")}, {"messages": chat("c", "d", "é", "f")}])
    (tmp_path / "b.jsonl").write_bytes(
        b"\xef\xbb\xbf" + json.dumps({"messages": chat("g", "h", "i", "j"), "targets": [1, 3]}).encode() + b"\n\n \n"
        + json.dumps({"messages": chat("k", "l")}).encode()
    )  # fmt: skip
    examples = ExampleFiles([first, tmp_path / "b.jsonl"])
    assert [e.answer["content"] for e in examples] == ["b", "f", "h", "j", "l"]
    assert [e.where.rpartition("/")[2] for e in examples] == [
        "a.jsonl:1", "a.jsonl:2", "b.jsonl:1", "b.jsonl:1", "b.jsonl:4",
    ]  # fmt: skip
    assert texts(examples[1].read) == ["é"]


def test_the_digest_tells_data_apart(tmp_path):
    a, b, same = (tmp_path / name for name in "abc")
    for path, text in ((a, "x"), (b, "y"), (same, "x")):
        write_lines(path, [{"messages": chat(text, "b")}])
    assert ExampleFiles([a]).digest == ExampleFiles([same]).digest != ExampleFiles([b]).digest


def test_the_first_wrong_line_is_named_and_the_others_counted(tmp_path):
    good = json.dumps({"messages": chat("a", "b")})
    path = tmp_path / "d.jsonl"
    path.write_text(f"{good}\n{{\n{good}\n[]\n1\n")
    with pytest.raises(ValueError, match=r"d\.jsonl:2: not JSON.* \(and 2 more lines that cannot be used\)"):
        ExampleFiles([path])


def test_no_file_and_no_example(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl: no such file"):
        ExampleFiles([tmp_path / "nowhere.jsonl"])
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="empty.jsonl: holds no example"):
        ExampleFiles([tmp_path / "empty.jsonl"])
    (tmp_path / "empty.jsonl").write_text("nonsense")
    with pytest.raises(FileFormatError, match=r"empty\.jsonl:1: not JSON"):
        ExampleFiles([tmp_path / "empty.jsonl"])


# --- content parts, and data in which nothing is written


def part(text):
    return {"type": "text", "text": text}


def test_content_parts_are_their_text_in_every_place():
    parts = [part("My dog is Rex."), part("He is old.")]
    line = {
        "write": [{"role": "user", "content": parts}],
        "read": [{"role": "user", "content": parts}],
        "answer": {"role": "assistant", "content": parts},
    }
    (example,) = parse_line(json.dumps(line).encode(), "x:1")
    assert {m["content"] for m in (*example.write, *example.read, example.answer)} == {"My dog is Rex.\nHe is old."}
    chat = [{"role": role, "content": parts} for role in ("user", "assistant") * 2]
    (example,) = parse_line(json.dumps({"messages": chat}).encode(), "x:1")
    assert all(isinstance(m["content"], str) for m in (*example.write, *example.read, example.answer))
    for wrong in ({"type": "image_url"}, "text"):
        chat[0]["content"] = [part("a"), wrong]
        with pytest.raises(ValueError, match=r"x:1: messages\[0\].content: got .* allowed a string or a list of"):
            parse_line(json.dumps({"messages": chat}).encode(), "x:1")


@pytest.mark.parametrize("blank", ("", " \n\t ", [part(" ")]), ids=("empty", "white space", "parts"))
def test_a_write_context_that_says_nothing_is_empty(blank):
    line = {"write": [{"role": "user", "content": blank}], "read": [{"role": "user", "content": "Q"}], "answer": "A"}
    (example,) = parse_line(json.dumps(line).encode(), "x:1")
    assert example.write == ()
    line["write"] = [{"role": "system", "content": "Be kind."}]
    (example,) = parse_line(json.dumps(line).encode(), "x:1")
    assert example.write == ()
    line["write"] += [{"role": "assistant", "content": "", "reasoning_content": "Hm."}]
    (example,) = parse_line(json.dumps(line).encode(), "x:1")
    assert len(example.write) == 2
