"""The report of runs made by hand: figures that a hand can count, texts that would be markup, damaged files."""

import html.parser
import json
import re
import xml.etree.ElementTree as ElementTree

import pytest
from run_directories import RUN, answer, scores, write_run

from deltamem_fast.errors import ArgumentError, FileFormatError, FileMissingError
from deltamem_fast.eval import report as module
from deltamem_fast.eval.answers import AnswerFile
from deltamem_fast.eval.report import build_report, costs, write_report
from deltamem_fast.eval.report_plot import draw_cost, points_of
from deltamem_fast.eval.report_tables import (
    category_table,
    difference_text,
    duration,
    label,
    markdown_task,
    plain,
    run_notes,
    split_row,
    task_of,
    task_table,
)

near = pytest.approx
DOCUMENTS = {"q1": "A", "q2": "A", "q3": "B"}
CATEGORIES = {"q1": "one hop", "q2": "dates", "q3": "one hop"}
ROWS = {
    ("locomo", "nothing+off"): scores({"q1": 0, "q2": 0, "q3": 1}, DOCUMENTS, CATEGORIES),
    ("locomo", "bm25-4+off"): scores({"q1": 1, "q2": 0, "q3": 1}, DOCUMENTS, CATEGORIES, notes=["99 keys are wrong."]),
    ("locomo", "bm25-4+msw"): scores({"q1": 0.5, "q2": 0.5, "q3": None}, DOCUMENTS, CATEGORIES, aggregate={"f": 0.25}),
    ("locomo", "nothing+msw"): scores({"q1": 1, "q2": 1, "q3": 1}, DOCUMENTS, CATEGORIES),
}
TOLD = [
    answer(id="q1", answer="x", context_tokens=100, question_tokens=10, answer_tokens=5, told_tokens=1000,
         tell_seconds=6.0, prefill_seconds=1.0, decode_seconds=0.4, peak_bytes=10_000_000),
    answer(id="q2", answer="x", context_tokens=200, question_tokens=20, answer_tokens=1, told_tokens=1000,
         tell_seconds=6.0, prefill_seconds=3.0, decode_seconds=0.0, peak_bytes=30_000_000),
    answer(id="q3", answer="x", context_tokens=300, question_tokens=30, answer_tokens=3, told_tokens=400,
         tell_seconds=3.0, context_seconds=0.5, prefill_seconds=2.0, decode_seconds=0.2, peak_bytes=20_000_000),
]  # fmt: skip
BARE = [answer(id="q1", answer="x", prefill_seconds=0.5), answer(id="q3", answer="y", prefill_seconds=0.5)]
ANSWERS = {("locomo", "bm25-4+msw"): TOLD, ("locomo", "nothing+off"): BARE}


@pytest.fixture
def directory(tmp_path):
    return write_run(tmp_path / "run", ROWS, answers=ANSWERS)


def rows_of(report, task="locomo"):
    return {row["row"]: row for row in task_of(report, task)["rows"]}


# --- figures


def test_scores_and_intervals(directory):
    rows = rows_of(build_report(directory))
    frozen, retrieved = rows["nothing+off"]["score"], rows["bm25-4+off"]["score"]
    # Two documents: both drawn twice (1/4 each) or one of each (1/2).
    assert (frozen["low"], frozen["mean"], frozen["high"]) == (0, near(1 / 3), 1)
    assert (retrieved["low"], retrieved["mean"], retrieved["high"]) == (0.5, near(2 / 3), 1)
    assert (frozen["documents"], frozen["questions"], frozen["resampled"]) == (2, 3, "documents")
    judged = rows["bm25-4+msw"]  # q3 has no score, so only document A is left
    assert (judged["score"]["mean"], judged["score"]["resampled"]) == (0.5, "questions")
    assert (judged["answered"], judged["scored"], judged["questions"]) == (3, 2, 3)


def test_paired_differences(directory):
    rows = rows_of(build_report(directory))
    assert rows["nothing+off"]["against"] == {}
    found = rows["bm25-4+off"]["against"]["nothing+off"]
    assert (found["mean"], found["low"], found["high"]) == (near(1 / 3), 0, 0.5)
    assert found["above_zero"] == near(0.75, abs=0.015)
    both = rows["bm25-4+msw"]["against"]
    assert list(both) == ["nothing+off", "bm25-4+off"]
    assert (both["nothing+off"]["mean"], both["nothing+off"]["low"], both["nothing+off"]["questions"]) == (0.5, 0.5, 2)
    assert (both["bm25-4+off"]["mean"], both["bm25-4+off"]["low"], both["bm25-4+off"]["high"]) == (0, -0.5, 0.5)
    assert list(rows["nothing+msw"]["against"]) == ["nothing+off"]


def test_costs(directory):
    rows = rows_of(build_report(directory))
    assert rows["bm25-4+msw"]["cost"] == {
        "context_tokens": 200,
        "question_tokens": 20,
        "answer_tokens": 3,
        "told_tokens": 700,  # 1,000 of A and 400 of B
        "prefill_seconds": 2.0,
        "shared_seconds": near((6 + 3.5) / 3),
        "decode_seconds_per_token": near(0.6 / 6),
        "seconds_per_question": near((1.4 + 3 + 2.2) / 3 + 9.5 / 3),
        "peak_bytes": 30_000_000,
    }
    assert rows["nothing+off"]["answered"] == 2 and rows["nothing+off"]["cost"]["decode_seconds_per_token"] is None
    assert rows["bm25-4+off"]["cost"] is None and rows["bm25-4+off"]["answered"] == 3


def test_a_document_that_was_told_twice_counts_the_mean():
    from deltamem_fast.eval.answers import Answer

    twice = [Answer("a", "", tell_seconds=4.0), Answer("b", "", tell_seconds=6.0)]
    assert costs(twice, {"a": "A", "b": "A"})["shared_seconds"] == 2.5


def test_categories_rows_and_tasks_stand_in_order(directory):
    found = build_report(directory)
    locomo = task_of(found, "locomo")
    assert [row["row"] for row in locomo["rows"]] == ["nothing+off", "nothing+msw", "bm25-4+off", "bm25-4+msw"]
    assert rows_of(found)["bm25-4+off"]["categories"] == {
        "dates": {"mean": 0, "questions": 1},
        "one hop": {"mean": 1, "questions": 2},
    }
    assert [task["name"] for task in found["tasks"]] == ["locomo", "ifeval"]
    assert locomo["notes"] == ["99 keys are wrong."]
    many = {
        ("t", f"{name}+off"): scores({"q": 1}, {}) for name in ("last-512", "last-2048", "yarn", "other", "bm25-16")
    }
    many |= {("t", "bm25-4+tsw"): scores({"q": 1}, {}), ("t", "bm25-4+off"): scores({"q": 1}, {})}
    report = build_report(write_run(directory.parent / "many", many, run={"model": "m"}))
    assert list(rows_of(report, "t")) == [
        "last-512+off", "last-2048+off", "yarn+off", "bm25-4+off", "bm25-4+tsw", "bm25-16+off", "other+off",
    ]  # fmt: skip


def test_a_report_is_json_and_the_same_again(directory):
    found = build_report(directory)
    written = write_report(directory)
    assert json.loads(written["report.json"].read_text()) == json.loads(json.dumps(found, allow_nan=False)) == found
    first = {name: path.read_bytes() for name, path in written.items()}
    assert sorted(first) == ["cost.png", "cost.svg", "report.html", "report.json", "report.md"]
    assert {name: path.read_bytes() for name, path in write_report(directory).items()} == first
    assert found["run"] == RUN and found["format_version"] == 1 and found["intervals"]["resamples"] == 10_000
    assert found["published"]["paper"]["scores"]["LoCoMo"]["TSW"] == 46.53


def test_a_row_keeps_its_figures_when_others_come(directory):
    before = rows_of(build_report(directory))["bm25-4+off"]
    write_run(directory, {("locomo", "everything+off"): scores({"q1": 1}, DOCUMENTS)})
    assert rows_of(build_report(directory))["bm25-4+off"] == before


# --- tables


def test_the_table(directory):
    table = task_table(build_report(directory), "locomo")
    assert table[0] == [
        "row", "F1, % (95 % interval)", "− frozen, points", "− without memory, points", "answered",
        "tokens in context", "told, tokens a document", "prefill", "shared, a question", "decode, a token",
        "in all, a question", "peak memory",
    ]  # fmt: skip
    # Of the draws, a quarter is above 0, but for chance.
    lines = {line[0]: [re.sub(r"\b2[3-7] %", "25 %", cell) for cell in line[1:]] for line in table[1:]}
    assert list(lines) == ["frozen, nothing in context (a part)", "state only, MSW", "bm25-4", "bm25-4 + MSW"]
    assert lines["bm25-4 + MSW"] == [
        "50.0 (50.0 to 50.0)", "+50.0 (+50.0 to +50.0; above 0: 100 %)", "0.0 (−50.0 to +50.0; above 0: 25 %)",
        "3 of 3 (2 with a score)", "200", "700", "2 s", "3.17 s", "100 ms", "5.37 s", "30.0 MB",
    ]  # fmt: skip
    assert lines["bm25-4"][0] == "66.7 (50.0 to 100.0)" and lines["bm25-4"][4:] == [""] * 7
    assert lines["state only, MSW"][2] == "" and lines["frozen, nothing in context (a part)"][1] == ""


def test_columns_without_anything_are_left_out(tmp_path):
    found = build_report(write_run(tmp_path, {("t", "nothing+off"): scores({"q": 1}, {}, metric="acc")}))
    assert task_table(found, "t") == [
        ["row", "acc, % (95 % interval)", "answered"],
        ["frozen, nothing in context", "100.0 (100.0 to 100.0)", "1 of 1"],
    ]
    assert category_table(found, "t") == [["row"]]


def test_categories_say_of_how_many_questions(directory):
    table = category_table(build_report(directory), "locomo")
    assert table[0] == ["row", "dates (1 question)", "one hop"]  # of one hop, a row has a score of one question only
    assert table[-1] == ["bm25-4 + MSW", "50.0", "50.0"]


def test_a_difference_on_fewer_questions_says_so():
    found = {"mean": -0.0004, "low": -0.02, "high": 0.01, "above_zero": 0.5, "questions": 2}
    assert difference_text(found, 3) == "0.0 (−2.0 to +1.0; above 0: 50 %; on 2 questions)"


def test_a_task_without_figures_is_one_line(directory):
    found = build_report(directory)
    assert markdown_task(found, "ifeval") == "Not measured yet."
    written = write_report(directory)
    assert written["report.md"].read_text().count("Not measured yet.") == 1
    assert written["report.html"].read_text().count("<p>Not measured yet.</p>") == 1
    with pytest.raises(ArgumentError, match="task: got 'ruler', allowed locomo, ifeval"):
        task_of(found, "ruler")


def test_a_row_that_only_a_judge_can_score(tmp_path):
    rows = {("t", "nothing+off"): scores({"q": None}, {"q": "A"}), ("t", "bm25-4+off"): scores({"q": 1}, {"q": "A"})}
    found = build_report(write_run(tmp_path, rows))
    assert rows_of(found, "t")["nothing+off"]["score"] is None
    assert rows_of(found, "t")["bm25-4+off"]["against"] == {"nothing+off": None}
    assert task_table(found, "t")[1][-1] == "1 of 1 (0 with a score)"
    write_report(tmp_path)


def test_rows_that_were_measured_otherwise_are_told(tmp_path):
    def written(name, **head):
        run = write_run(tmp_path / name, ROWS)
        for row, more in {"nothing+off": {}, "bm25-4+off": {"commit": "abc", "fed": {"batch": 8}}, **head}.items():
            with AnswerFile(run / "answers" / "locomo" / f"{row}.jsonl", {"row": row, **more}) as file:
                file.append(BARE)
        return run

    report = build_report(written("first"))
    assert run_notes(report, "locomo") == [
        "Rows differ in commit: not recorded: nothing+off, nothing+msw, bm25-4+msw; abc: bm25-4+off.",
        "Rows differ in batch size: not recorded: nothing+off, nothing+msw, bm25-4+msw; 8: bm25-4+off.",
    ]
    assert "Rows differ in commit" in write_report(tmp_path / "first")["report.html"].read_text()
    path = tmp_path / "first" / "scores" / "locomo" / "bm25-4+msw.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"judge": "gpt"}))
    assert run_notes(build_report(tmp_path / "first"), "locomo")[-1] == (
        "Rows differ in judge: none: nothing+off, nothing+msw, bm25-4+off; gpt: bm25-4+msw."
    )


def test_labels():
    def of(row):
        policy, memory = split_row(row)
        return label({"row": row, "policy": policy, "memory": memory})

    assert label({"row": "yarn+off", "policy": "yarn", "memory": "off", "answered": 2, "questions": 3}) == (
        "yarn (a part)"
    )
    assert of("nothing+ssw-sentence") == "state only, SSW-SENTENCE"

    assert [of(row) for row in ("nothing+off", "nothing+tsw", "last-2048+off", "bm25-4+msw", "yarn+a+b", "plain")] == [
        "frozen, nothing in context", "state only, TSW", "last-2048", "bm25-4 + MSW", "yarn+a + b", "plain",
    ]  # fmt: skip


def test_durations():
    assert [duration(seconds) for seconds in (0, 2.5e-5, 0.0364, 1, 12.34, 1234.5)] == [
        "0", "25 µs", "36.4 ms", "1 s", "12.3 s", "1234 s",
    ]  # fmt: skip


# --- texts that would be markup

HOSTILE = (
    "</script><script>alert(1)</script><img src=x onerror=alert(1)>|`*_$x^2$ [a](javascript:alert(1)) \x1b[2J &amp;"
)


class Page(html.parser.HTMLParser):
    """What a page holds: its elements and their attributes, whether they close, and its text."""

    VOID = ("meta", "br", "img", "link", "input")

    def __init__(self, text):
        super().__init__()
        self.open, self.found, self.text = [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def hostile(tmp_path):
    kept = scores({HOSTILE: 1, "b": 0}, {HOSTILE: HOSTILE, "b": "B"}, {HOSTILE: HOSTILE, "b": "x"})
    kept |= {"title": HOSTILE, "metric": HOSTILE, "notes": [HOSTILE], "aggregate": {HOSTILE: 1}}
    name = HOSTILE.replace("/", "∕")
    rows = {("t", "nothing+off"): kept, ("t", f"{name[:80]}+{name[:40]}"): kept}
    run = {**RUN, "model": HOSTILE, HOSTILE: HOSTILE, "tasks": {"t": HOSTILE, HOSTILE: HOSTILE}}
    answers = {("t", "nothing+off"): [answer(id=HOSTILE, answer=HOSTILE, prefill_seconds=1.0)]}
    return write_run(tmp_path / "run", rows, run=run, answers=answers)


def test_a_hostile_run_stays_text_in_the_page(hostile):
    written = write_report(hostile)
    page = Page(written["report.html"].read_text())
    assert page.open == []
    tags = [tag for tag, _ in page.found]
    assert tags.count("script") == 1 and "img" not in tags and "iframe" not in tags
    assert not [name for _, attributes in page.found for name in attributes if name.startswith("on")]
    assert page.text.count("</script><script>alert(1)</script><img src=x onerror=alert(1)>") >= 6
    assert "\x1b" not in page.text


def test_a_hostile_run_stays_text_in_markdown(hostile):
    text = write_report(hostile)["report.md"].read_text()
    assert "<" not in text and "\x1b" not in text and not re.search(r"(?<!\\)\]\(javascript", text)
    for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_plain_text_for_markdown():
    assert plain("a_b snake_case _x_ *y* [z] `q` | <b> & \n new") == (
        "a_b snake_case \\_x\\_ \\*y\\* \\[z\\] \\`q\\` \\| &lt;b&gt; &amp; new"
    )


# --- the page and the picture


def test_the_page_loads_nothing(directory):
    text = write_report(directory)["report.html"].read_text()
    page = Page(text)
    assert page.open == [] and [tag for tag, _ in page.found].count("svg") == 1
    for tag, attributes in page.found:
        for name in ("src", "srcset", "data", "poster", "action", "background"):
            assert name not in attributes, (tag, attributes)
        for name in ("href", "xlink:href"):
            if name in attributes:  # a source to read, or a part of the picture
                assert attributes[name].startswith("https://" if tag == "a" else "#")
    assert not re.search(r"@import|url\((?!#)", text)
    assert "default-src 'none'" in text and "script-src 'sha256-" in text
    assert "prefers-color-scheme: dark" in text
    assert page.text.count("ours: not measured yet") == 1


def test_sorting_has_a_value_where_there_is_a_figure(directory):
    text = write_report(directory)["report.html"].read_text()
    assert 'data-value="30000000">30.0 MB' in text and 'data-value="0.5">50.0 (50.0 to 50.0)' in text


def test_the_picture(directory):
    found = build_report(directory)
    drawn = draw_cost(found)
    assert drawn["cost.png"].startswith(b"\x89PNG") and drawn == draw_cost(found)
    root = ElementTree.fromstring(drawn["cost.svg"])
    assert root.tag.endswith("svg") and b"<metadata" not in drawn["cost.svg"] and b"DOCTYPE" not in drawn["cost.svg"]
    points = {point.name: point for point in points_of(task_of(found, "locomo"))}
    assert list(points) == ["frozen, nothing in context (a part)", "bm25-4 + MSW"]
    assert points["bm25-4 + MSW"].seconds == near(2.2 + 9.5 / 3) and points["bm25-4 + MSW"].score == 50


def test_many_names_do_not_cover_each_other(tmp_path, monkeypatch):
    from deltamem_fast.eval import report_plot

    names = [f"{policy}+{memory}" for policy in ("nothing", "bm25-4", "last-2048") for memory in ("off", "tsw", "msw")]
    rows, answers = {}, {}
    for place, name in enumerate(names):
        rows["t", name] = scores({"a": 0.5 + place / 200, "b": 0.4}, {"a": "A", "b": "B"})
        answers["t", name] = [answer(id=id, answer="", prefill_seconds=1 + place / 50) for id in "ab"]
    report, boxes = build_report(write_run(tmp_path, rows, answers=answers)), []

    def kept(figure, save=report_plot._saved, **options):
        if not boxes:
            boxes.extend(text.get_window_extent() for axes in figure.axes for text in axes.texts)
            assert all(box.x0 >= axes.get_window_extent().x0 for axes in figure.axes for box in boxes)
        return save(figure, **options)

    monkeypatch.setattr(report_plot, "_saved", kept)
    draw_cost(report)
    assert len(boxes) == len(names)
    shrunk = [box.shrunk(0.98, 0.9) for box in boxes]
    assert not [(a, b) for a in range(9) for b in range(a) if shrunk[a].overlaps(shrunk[b])]


def test_without_a_cost_there_is_no_picture_and_an_old_one_goes(directory, tmp_path):
    write_report(directory)
    for path in (directory / "answers" / "locomo").iterdir():
        path.unlink()
    assert sorted(write_report(directory)) == ["report.html", "report.json", "report.md"]
    assert not (directory / "cost.svg").exists() and not (directory / "cost.png").exists()


def test_without_matplotlib_the_report_says_so(directory, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    written = write_report(directory)
    assert sorted(written) == ["report.html", "report.json", "report.md"]
    for name in ("report.md", "report.html"):
        assert "No picture: matplotlib is not installed" in written[name].read_text()


# --- damaged runs


def test_no_run(tmp_path):
    with pytest.raises(FileMissingError, match="has no run.json, allowed the directory of a run"):
        build_report(tmp_path)
    with pytest.raises(FileMissingError):
        write_report(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"scores": {"q1": "x"}}, "scores: 'q1': got 'x', allowed a number or null"),
        ({"scores": {"q1": True}}, "scores: 'q1': got True"),
        ({"scores": {"q1": 10**400}}, "scores: 'q1': got 1"),
        ({"scores": []}, "scores: got [], allowed an object"),
        ({"documents": {"q1": 3}}, "documents: 'q1': got 3, allowed text"),
        ({"categories": {"q1": None}}, "categories: 'q1': got None, allowed text"),
        ({"aggregate": {"f": None}}, "aggregate: 'f': got None, allowed a number"),
        ({"notes": "x"}, "notes: got 'x', allowed a list"),
        ({"notes": [1]}, "notes: got [1], allowed texts"),
        ({"metric": None}, "metric: got None, allowed text"),
    ],
)
def test_damaged_scores_are_told_with_their_file(directory, change, said):
    path = directory / "scores" / "locomo" / "bm25-4+off.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(FileFormatError) as caught:
        write_report(directory)
    assert str(caught.value).startswith(f"{path}: {said}")
    assert not (directory / "report.json").exists()


def test_damaged_answers_are_told_with_their_file_and_line(directory):
    path = directory / "answers" / "locomo" / "nothing+off.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"id": "q1"', b'"id": 1'))
    with pytest.raises(FileFormatError, match=re.escape(f"{path}, line 2: id: got 1, allowed text")):
        build_report(directory)


def test_a_torn_last_answer_is_not_counted(directory):
    path = directory / "answers" / "locomo" / "nothing+off.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    assert rows_of(build_report(directory))["nothing+off"]["answered"] == 1


def test_damaged_tasks_of_a_run(directory):
    (directory / "run.json").write_text(json.dumps({**RUN, "tasks": [3]}))
    with pytest.raises(FileFormatError, match="tasks: got"):
        build_report(directory)


def test_what_was_left_out_and_what_was_verified_stands_at_its_task(tmp_path):
    equal = {"documents": 2, "states": 3e-7, "logits": 2e-6, "tokens": 0, "holds": True}
    run = RUN | {
        "left_out": {"locomo": {"everything+off": "<b>too long</b>"}},
        "verified": {"locomo": {"nothing+off": equal, "nothing+msw": equal | {"states": 2e-6, "tokens": 1}}},
    }
    write_run(tmp_path, {("locomo", "nothing+off"): scores({"q": 1.0}, {"q": "d"})}, run=run)
    write_report(tmp_path)
    for name in ("report.md", "report.html"):
        text = (tmp_path / name).read_text()
        assert "Left out: everything+off: &lt;b&gt;too long&lt;/b&gt;" in text
        assert "padding equal plain forwards, one a prompt" in text and "(2 rows, 2 documents each)" in text
        assert "2e-06 of a layer's largest state" in text.replace("&#x27;", "'") and "1 answer begin" in text
        assert "left out:" not in text
    run["verified"]["locomo"]["nothing+msw"]["holds"] = False
    write_run(tmp_path, {}, run=run)
    assert "DO NOT EQUAL" in write_report(tmp_path)["report.md"].read_text()


def test_what_a_record_has_of_other_kinds_is_no_error(tmp_path):
    write_run(tmp_path, {}, run=RUN | {"left_out": 3, "verified": {"locomo": [1]}})
    assert "Not measured yet." in write_report(tmp_path)["report.md"].read_text()
