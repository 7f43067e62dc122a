"""Answers on disk: what a killed run leaves, who may write, which run may go on with which file."""

import json
import os
import subprocess
import sys

import pytest

from deltamem_fast.errors import ArgumentError, FileFormatError, FileMissingError, StateError, WaitedTooLongError
from deltamem_fast.eval.answers import FORMAT, Answer, AnswerFile, differing, read_answer_file

HEAD = {
    "task": "locomo",
    "row": "bm25-4+msw",
    "model": "smollm2",
    "adapter": "sha256:1",
    "policy": {"name": "bm25", "chunks": 4},
    "seed": 0,
    "data": "sha256:2",
    "versions": {"torch": "2.13.0"},
}
FULL = Answer("a", "Lisbon", 1, 2, 3, 4, 0.5, 0.25, 0.125, 1.5, 6)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "answers" / "locomo" / "bm25-4+msw.jsonl"


def filled(path, *answers, head=HEAD):
    with AnswerFile(path, head) as file:
        for answer in answers:
            file.append(answer)
    return path.read_bytes()


def test_what_was_appended_is_read_again(path):
    hostile = Answer('"\n</script>|', "line one\nline two \u2028 \udc80 é")
    data = filled(path, FULL, [hostile, Answer("c", "")])
    assert data.count(b"\n") == 4
    head, answers = read_answer_file(path)
    assert head == {"format": FORMAT, "format_version": 1, **HEAD}
    assert list(answers.values()) == [FULL, hostile, Answer("c", "")]
    assert json.loads(data.splitlines()[1]) == FULL.to_dict()


def test_a_file_goes_on(path):
    before = filled(path, FULL)
    with AnswerFile(path, HEAD) as file:
        assert file.answers == {"a": FULL} and file.dropped == 0
        with pytest.raises(ArgumentError, match="answers: id: got 'a', which has an answer, allowed a new one"):
            file.append(FULL)
        file.append(Answer("b", "x"))
        assert path.read_bytes() == before + json.dumps(Answer("b", "x").to_dict()).encode() + b"\n"  # at once
    assert list(read_answer_file(path)[1]) == ["a", "b"]


@pytest.mark.parametrize("cut", [1, 7, 40])
def test_a_torn_last_line_is_dropped_and_answered_again(path, cut):
    whole = filled(path, FULL, Answer("b", "y"))
    path.write_bytes(whole[:-cut])
    assert list(read_answer_file(path)[1]) == ["a"]
    assert path.read_bytes() == whole[:-cut]  # a reader changes nothing
    with AnswerFile(path, HEAD) as file:
        assert list(file.answers) == ["a"] and file.dropped > 0
        file.append(Answer("b", "y"))
    assert path.read_bytes() == whole


def test_nothing_of_a_torn_line_stays(path):
    whole = filled(path, FULL)
    path.write_bytes(whole + b'{"id": "b", "answer": "' + b"long " * 99)
    AnswerFile(path, HEAD).close()
    assert path.read_bytes() == whole


def test_each_batch_is_synced_once(path, monkeypatch):
    synced, fsync = [], os.fsync
    with AnswerFile(path, HEAD) as file:
        monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.append(descriptor), fsync(descriptor)))
        file.append([FULL, Answer("b", "x")])
        file.append(Answer("c", "x"))
        assert synced == [file._file] * 2


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_killed_in_the_head(path, share):
    whole = filled(path)
    path.write_bytes(whole[: int(share * (len(whole) - 1))])
    filled(path, FULL)
    assert path.read_bytes() == whole + json.dumps(FULL.to_dict()).encode() + b"\n"


def test_a_process_that_was_killed_leaves_what_it_had_answered(path):
    code = (
        "import os, sys\nfrom deltamem_fast.eval.answers import Answer, AnswerFile\n"
        "file = AnswerFile(sys.argv[1], {'task': 't'})\nfile.append(Answer('a', 'x'))\n"
        "os.write(file._file, b'') or os.pwrite(file._file, b'{\"id\": \"b', file._size)\nos.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, timeout=60)
    assert done.returncode == -9, done.stderr
    with AnswerFile(path, {"task": "t"}) as file:
        assert list(file.answers) == ["a"] and file.dropped == len('{"id": "b')


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 1}, "seed: got 1, but"),
        ({"policy": {"name": "bm25", "chunks": 8}}, "policy.chunks: got 8, but"),
        ({"adapter": None}, "adapter: got None, but"),
        ({"more": "x"}, "more: got 'x', but"),
        ({"seed": 0.0}, "seed: got 0.0, but"),
    ],
)
def test_another_head_is_refused(path, change, said):
    before = filled(path, FULL)
    with pytest.raises(ArgumentError) as caught:
        AnswerFile(path, {**HEAD, **change})
    assert str(caught.value).startswith(said)
    assert "give another --output, or the same arguments as before" in str(caught.value)
    assert path.read_bytes() == before
    AnswerFile(path, HEAD).close()  # the lock is gone, too


def test_a_head_without_a_setting_is_another(path):
    filled(path, FULL)
    with pytest.raises(ArgumentError, match=r"data: got None, but .* has answers with 'sha256:2'"):
        AnswerFile(path, {name: value for name, value in HEAD.items() if name != "data"})


def test_other_versions_may_go_on_and_the_first_head_stays(path):
    filled(path, FULL)
    with AnswerFile(path, {**HEAD, "versions": {"torch": "2.14.0"}, "device": "cpu"}) as file:
        assert file.head["versions"] == {"torch": "2.13.0"} and "device" not in file.head


def test_differing_names_what_lies_deeper():
    assert list(differing({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 4}, "e": 5})) == [
        ("a.c", 2, 4),
        ("d", 3, None),
        ("e", None, 5),
    ]


def test_two_openers(path):
    with AnswerFile(path, HEAD), pytest.raises(WaitedTooLongError, match="another process writes these answers"):
        AnswerFile(path, HEAD)
    AnswerFile(path, HEAD).close()


def test_another_process_is_told_so(path):
    code = "import sys\nfrom deltamem_fast.eval.answers import AnswerFile\nAnswerFile(sys.argv[1], {})"
    with AnswerFile(path, {}):
        done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode and "another process writes these answers; wait for it" in done.stderr


def test_a_damaged_line_in_the_middle(path):
    lines = filled(path, FULL, Answer("b", "y")).splitlines(keepends=True)
    for bad, said in (
        (b'{"id": "a"\n', "not JSON"),
        (b"\0\0\0\n", "not JSON"),
        (b"\n", "not JSON"),
        (b'{"id": "a"}\n', "has no answer"),
        (b'{"id": "a", "answer": 3}\n', "answer: got 3, allowed text"),
        (b'{"id": "", "answer": "x"}\n', "id: got ''"),
        (b'{"id": "a", "answer": "x", "told_tokens": -1}\n', "told_tokens: got -1, allowed an integer, 0 or more"),
        (b'{"id": "a", "answer": "x", "told_tokens": true}\n', "told_tokens: got True"),
        (b'{"id": "a", "answer": "x", "tell_seconds": NaN}\n', "NaN is not JSON"),
        (b'{"id": "a", "answer": "x", "colour": 1}\n', "unknown: 'colour'"),
        (b'{"id": "b", "answer": "x"}\n', "id 'b' stands there twice"),
        (b"[]\n", "got a JSON list"),
    ):
        data = b"".join([lines[0], bad, lines[2]])
        path.write_bytes(data)
        for opened in (lambda: read_answer_file(path), lambda: AnswerFile(path, HEAD)):
            with pytest.raises(FileFormatError) as caught:
                opened()
            number = 3 if "twice" in said else 2
            assert f"{path}, line {number}: " in str(caught.value) and said in str(caught.value)
        assert path.read_bytes() == data


@pytest.mark.parametrize(
    "data", [b"Dear diary,\n", b"no line", b'{"a": 1}\n', b'{"format": "x", "format_version": 1}\n']
)
def test_somebody_elses_file_is_left_alone(path, data):
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    with pytest.raises(FileFormatError):
        AnswerFile(path, HEAD)
    assert path.read_bytes() == data


def test_a_newer_format(path):
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"format": FORMAT, "format_version": 2}) + "\n")
    with pytest.raises(FileFormatError, match="format version 2, this version reads 1 to 1"):
        read_answer_file(path)


def test_answers_of_another_program(tmp_path):
    path = tmp_path / "theirs.jsonl"
    path.write_text('{"id": "a", "answer": "x", "model": "theirs"}\n\n{"id": "b", "answer": ""}')
    assert read_answer_file(path) == ({}, {"a": Answer("a", "x"), "b": Answer("b", "")})
    path.write_text('{"id": "a", "answer": "x"}\n{"id": "b", "ans')
    with pytest.raises(FileFormatError, match=r"theirs.jsonl, line 2: not JSON"):
        read_answer_file(path)
    path.write_text("")
    with pytest.raises(FileFormatError, match=r"line 1: not JSON"):
        read_answer_file(path)
    with pytest.raises(FileMissingError, match="ANSWERS: "):
        read_answer_file(tmp_path / "none", "ANSWERS")


def test_bad_answers_are_refused_before_anything_is_written(path):
    with AnswerFile(path, HEAD) as file:
        before = path.read_bytes()
        for bad, said in (
            (Answer("", "x"), "id: got ''"),
            (Answer("a", None), "answer: got None, allowed text"),
            (Answer("a", "x", prefill_seconds=float("nan")), "prefill_seconds: got nan, allowed a number, 0 or more"),
            (Answer("a", "x", peak_bytes=-1), "peak_bytes: got -1"),
        ):
            with pytest.raises(ArgumentError) as caught:
                file.append([Answer("good", "x"), bad])
            assert f"answers: {said}" in str(caught.value)
        with pytest.raises(ArgumentError):
            file.append([Answer("twice", "x"), Answer("twice", "y")])
        with pytest.raises(TypeError, match="answers: got dict, allowed answers"):
            file.append([{"id": "a"}])
        assert path.read_bytes() == before and file.answers == {}
    with pytest.raises(StateError, match="closed"):
        file.append(FULL)
    file.close()


def test_a_full_disk_leaves_no_half_line(path, monkeypatch):
    with AnswerFile(path, HEAD) as file:
        before, pwrite = path.read_bytes(), os.pwrite

        def full(descriptor, data, offset):
            if offset > len(before):
                raise OSError(28, "No space left on device")
            return pwrite(descriptor, data[:9], offset)

        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match="No space left on device"):
            file.append(FULL)
        monkeypatch.undo()
        assert path.read_bytes() == before and file.answers == {}
        file.append(FULL)
    assert read_answer_file(path)[1] == {"a": FULL}


def test_bad_heads(path):
    for head, said in (
        ({"seed": float("nan")}, "not JSON"),
        ({"seed": object()}, "not JSON"),
        (None, "head: got NoneType, allowed a mapping"),
    ):
        with pytest.raises((ArgumentError, TypeError), match=said):
            AnswerFile(path, head)
    assert not path.exists()


def test_a_link_is_not_followed(path, tmp_path):
    path.parent.mkdir(parents=True)
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="a symbolic link, allowed a file"):
        AnswerFile(path, HEAD)


def test_neither_torch_nor_transformers_is_imported():
    modules = ", ".join(f"deltamem_fast.eval.{name}" for name in ("answers", "statistics"))
    code = f"import sys, {modules}\nprint({{'torch', 'transformers'}} & {{*sys.modules}})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stdout == "set()\n"
