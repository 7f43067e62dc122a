"""MemoryAgentBench: its rows, chunks, and scores by source, by hand."""

import json
import sys
from pathlib import Path

import pytest

import deltamem_fast
from deltamem_fast.errors import ArgumentError, FileFormatError, FileMissingError
from deltamem_fast.eval import agent_bench
from deltamem_fast.eval.agent_bench import (
    AS_PAPER,
    FAMILIES,
    TASK,
    chunks_of,
    family_of,
    load,
    overall,
    said,
    score,
    score_as_paper,
)
from deltamem_fast.eval.data import Question
from deltamem_fast.eval.movies import listed, recall_at_5, title_of
from deltamem_fast.eval.scoring import score_answers

DATA = Path(deltamem_fast.__file__).parent / "data/eval/agent_bench.json"
ROW = {
    "context": "One. Two.",
    "questions": ["first?", "second?"],
    "answers": [["1"], ["2", "two"]],
    "metadata": {"source": "ruler_qa1_197K"},
}


def asked(source, *answers, **more):
    return Question("q", "?", answers, source, more=more)


def written(tmp_path, rows, name="rows.json"):
    path = tmp_path / name
    path.write_text(rows if isinstance(rows, str) else json.dumps(rows))
    return path


def changed(**values):
    return [{**ROW, **values}]


def test_the_shipped_rows_cover_every_competency_and_way_of_scoring():
    families = [family_of(question.category) for document in load(DATA) for question in document.questions]
    assert {family.scored for family in families} == {family.scored for family in FAMILIES}
    assert {family.competency for family in families} == {family.competency for family in FAMILIES}


def test_a_row_is_a_document(tmp_path):
    document = load(written(tmp_path, [ROW, ROW]))[1]
    assert document.id == "ruler_qa1_197K-1" and document.parts == ("One. Two.",)
    first, second = document.questions
    assert (first.id, first.answers, first.category, first.query) == (
        "ruler_qa1_197K-1-q0", ("1",), "ruler_qa1_197K", "first?"
    )  # fmt: skip
    assert second.answers == ("2", "two") and "second?" in second.text and second.more["new_tokens"] == 50


def test_all_answers_of_a_single_question_are_accepted(tmp_path):
    for answers in (["1", "one"], [["1", "one"]]):
        found = load(written(tmp_path, changed(questions=["q"], answers=answers)))
        assert found[0].questions[0].answers == ("1", "one")


def test_json_lines_parquet_and_directories_hold_the_same(tmp_path):
    import pyarrow
    from pyarrow import parquet

    expected = load(written(tmp_path, [ROW, ROW]))
    lines = written(tmp_path, "\n".join(map(json.dumps, [ROW, ROW])), "rows.jsonl")
    table = tmp_path / "split/rows.parquet"
    table.parent.mkdir()
    parquet.write_table(pyarrow.Table.from_pylist([ROW, ROW]), table)
    assert load(lines) == load(table) == load(table.parent) == expected


def test_chunks_are_whole_sentences_and_lose_nothing():
    text = "".join(f"Sentence number {i} is here. " for i in range(2000))
    chunks = chunks_of(text)
    assert len(chunks) == 4  # 60 thousand characters
    assert all(len(chunk) <= 4096 * 4 and chunk.endswith("here.") for chunk in chunks)
    assert " ".join(chunks) == text.strip()
    assert chunks_of("x" * 20_000 + ". Short.") == ("x" * 20_000 + ".", "Short.")
    assert chunks_of("no end\nhere") == ("no end\nhere",)
    assert chunks_of(" \n") == ()


@pytest.mark.parametrize(
    ("answer", "expected"),
    (
        ("Ostrow", "Ostrow"),
        ("Answer: Ostrow\nmore", "Ostrow"),
        ("I think.\nANSWER:Ostrow", "Ostrow"),
        ("Answer: answer: Ostrow", "Ostrow"),
        ("first\nsecond", "first"),
        ("\nsecond", ""),
        ("", ""),
    ),
)
def test_what_is_said(answer, expected):
    assert said(answer) == expected


@pytest.mark.parametrize(
    ("source", "accepted", "answer", "expected"),
    (
        ("ruler_qa1_197K", ("Old Meg",), "It is called old Meg.", 1),
        ("ruler_qa2_421K", ("Malmo", "Malmö"), "Malmö", 1),
        ("ruler_qa1_197K", ("Old Meg",), "First line\nOld Meg", 1),
        ("eventqa_full", ("Quill finds glass",), "B: Quill finds glass.", 1),
        ("eventqa_full", ("Quill finds glass",), "Well.\nQuill finds glass", 0),  # the first line alone counts
        ("icl_nlu_8296shot_balance", ("43",), "43", 1),
        ("icl_nlu_8296shot_balance", ("43",), "43\nlabel: 7", 1),
        ("icl_nlu_8296shot_balance", ("43",), "label: 43", 0),  # strict, as published
        ("icl_banking77_5900shot_balance", ("43",), "143", 0),
        ("detective_qa", ("C. the nephew",), "The answer: c the nephew", 1),
        ("detective_qa", ("C. the nephew",), "C. the nephew, surely", 0),
        ("factconsolidation_sh_6k", ("Ostrow",), "Ostrow, not Dell", 1),
        ("factconsolidation_mh_262k", ("Runa Pike",), "Otto Brand", 0),
        ("longmemeval_s*", ("Comet",), "Comet", None),
        ("infbench_sum_eng_shots2", ("All.",), "All.", None),
    ),
)
def test_scores_by_hand(source, accepted, answer, expected):
    assert score(asked(source, *accepted), answer) == expected


def test_recall_of_recommendations_by_hand():
    known = [
        "<http://x.org/Iron_Man_(2008_film)>",
        "<http://x.org/Jaws>",
        "<http://x.org/Up_(film)>",
        "<http://x.org/Heat>",
    ]
    assert title_of(known[0]) == "Iron Man"
    assert listed("Sure!\n1. Iron Man (2008)\n2) Jaws\n3 - Up") == ["Iron Man", "Jaws", "Up"]
    assert listed("Jaws, Up") == ["Jaws", "Up"]
    # Irn Man is one letter from Iron Man; Heat was not recommended
    assert recall_at_5("1. irn man\n2. JAWS", [known[0], known[3]], known) == 0.5
    # the sixth does not count
    assert recall_at_5("1. Up\n2. Up\n3. Up\n4. Up\n5. Up\n6. Jaws", [known[1]], known) == 0


def test_summaries_need_key_points(tmp_path):
    row = {**ROW, "questions": ["q"], "answers": [["All."]], "metadata": {"source": "infbench_sum_eng_shots2"}}
    path = written(tmp_path, [row])
    assert "keypoints" in load(path)[0].questions[0].more["needs"]
    found = score_answers(TASK, load(path), {"infbench_sum_eng_shots2-0-q0": "All."}, lambda *given: 0.0)
    assert found["scores"] == {"infbench_sum_eng_shots2-0-q0": None}
    assert found["unscored_for"] == {"needs keypoints in its metadata": 1}
    assert AS_PAPER.score(AS_PAPER.load(path)[0].questions[0], "All.") == 1
    row["metadata"]["keypoints"] = ["A cup vanishes."]
    assert load(written(tmp_path, [row]))[0].questions[0].more == {
        "new_tokens": 1200, "judge": "summary", "key_points": ["A cup vanishes."]
    }  # fmt: skip


def test_recommendations_need_the_table_of_movies(tmp_path):
    row = {**ROW, "questions": ["q"], "answers": [["11"]], "metadata": {"source": "recsys_redial_full"}}
    question = load(written(tmp_path, [row]))[0].questions[0]
    assert score(question, "1. Jaws") is None and "entity2id.json" in question.more["needs"]
    (tmp_path / "entity2id.json").write_text('{"<http://x.org/Jaws>": 11, "<http://x.org/Up>": 12}')
    question = load(written(tmp_path, [row]))[0].questions[0]
    assert score(question, "1. Jaws") == 1 and score(question, "1. Up") == 0
    row["answers"] = [["13"]]
    assert "entity2id.json" in load(written(tmp_path, [row]))[0].questions[0].more["needs"]


def test_overall_is_the_mean_of_competencies_of_the_means_of_data_sets():
    scores = {
        "ruler_qa1_197K": [1.0, 1.0, 0.0, 0.0],  # 0.5
        "eventqa_full": [1.0],  # with the next one data set: 0.5
        "eventqa_65536": [0.0],
        "longmemeval_s*": [],  # not judged: left out
        "icl_nlu_8296shot_balance": [0.0],
        "detective_qa": [1.0],
        "factconsolidation_sh_6k": [1.0, 1.0, 1.0],
        "factconsolidation_mh_6k": [0.0],
    }
    found = overall(scores)
    assert found["accurate retrieval"] == 0.5 and found["test time learning"] == 0
    assert found["long range understanding"] == 1 and found["conflict resolution"] == 0.5
    assert found["overall"] == 0.5
    assert found["question_mean"] == pytest.approx(7 / 12)
    del scores["detective_qa"]
    assert overall(scores)["overall"] is None and overall(scores)["long range understanding"] is None


@pytest.mark.parametrize(
    ("value", "message"),
    (
        ("[1]", "array of objects"),
        ("[]", "has no row; it is the data set ai-hyz/MemoryAgentBench"),
        (changed(metadata={}), "row 0: has no 'source'"),
        (changed(metadata={"source": "other"}), r"got 'other', allowed ruler_qa1\*"),
        (changed(context=""), "no context"),
        (changed(context=7), "'context': got a int, allowed str"),
        (changed(answers=[["1"]]), "has 2 questions and 1 answers"),
        (changed(answers=[["1"], []]), "question 1: has no answer"),
        (changed(questions=["a", 7]), "question 1: 'question': got a int"),
    ),
    ids=range(9),
)
def test_other_formats_are_told(tmp_path, value, message):
    with pytest.raises(FileFormatError, match=message):
        load(written(tmp_path, value))


def test_a_damaged_line_is_told_by_its_number(tmp_path):
    path = written(tmp_path, json.dumps(ROW) + "\n\n{damaged\n", "rows.jsonl")
    with pytest.raises(FileFormatError, match=r"rows\.jsonl: line 3: not JSON"):
        load(path)
    path = written(tmp_path, "no table", "rows.parquet")
    with pytest.raises(FileFormatError, match="not a parquet file"):
        load(path)


def test_without_data_the_error_says_where_it_is(tmp_path, monkeypatch):
    with pytest.raises(FileMissingError, match="ai-hyz/MemoryAgentBench of https://huggingface.co/datasets"):
        load(tmp_path / "none")
    with pytest.raises(ArgumentError, match=r"holds no \.json, \.jsonl, \.parquet file"):
        load(tmp_path)

    def unreachable(*args, **options):
        raise OSError("no network\nat all")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(FileMissingError, match=r"cannot be reached \(no network\); it is the data set"):
        load(None)


def test_from_the_hub_the_snapshot_is_read(tmp_path, monkeypatch):
    written(tmp_path, [ROW])
    given = {}

    def snapshot(hub_id, **options):
        given.update(options, hub_id=hub_id)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert load(None)[0].id == "ruler_qa1_197K-0"
    assert given["hub_id"] == agent_bench.HUB_ID and given["repo_type"] == "dataset"


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match="pip install pyarrow"):
        load(written(tmp_path, "", "rows.parquet"))


@pytest.mark.parametrize(
    ("source", "accepted", "answer", "expected"),
    [
        ("icl_nlu_8296shot_balance", ["43"], "label: 43", 1),  # strictly 0
        ("icl_nlu_8296shot_balance", ["43"], "44", 0),
        ("longmemeval_s*", ["the red bike"], "It was a red  bike!", 1),  # no judge
        ("detective_qa", ["B. Dr. Bell"], "Answer: b dr bell", 1),  # a mark is a space
        ("ruler_qa1_197K", ["the"], "anything", 0),  # nothing is left of the accepted one
        ("infbench_sum_eng_shots2", ["a boy finds gold"], "A boy finds a map.", 2 * 2 / (3 + 3)),
        ("infbench_sum_eng_shots2", ["a boy finds gold"], "\nA boy finds gold.\nThen more and more.", 1),
    ],
)
def test_scores_as_the_paper_has_them_by_hand(source, accepted, answer, expected):
    assert score_as_paper(asked(source, *accepted), answer) == pytest.approx(expected)


def test_for_the_paper_no_judge_is_asked_and_questions_are_alike():
    documents = AS_PAPER.load(DATA)
    assert not any("judge" in question.more for document in documents for question in document.questions)
    assert [one.id for one in documents] == [one.id for one in load(DATA)]
    assert AS_PAPER.overall({"icl_nlu_8296shot_balance": [1, 1, 1], "detective_qa": [0]}) == {"overall": 0.75}
    needs = asked("recsys_redial_full", "1", needs="the table")
    assert score_as_paper(needs, "1. A movie") is None
