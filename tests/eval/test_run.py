"""A run from the command line to its report: rows, what goes on after a kill, what is left out, and mistakes."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from support import loud_adapter, tiny_model
from tokenizers_for_tests import chatml_tokenizer
from transformers import AutoModelForCausalLM

from deltamem_fast import DeltaMemConfig, patch_model, save_adapter, unpatch_model
from deltamem_fast.cli.main import main
from deltamem_fast.errors import StateError
from deltamem_fast.eval import answering, run
from deltamem_fast.eval.answers import read_answer_file
from deltamem_fast.eval.paper import SAMPLES

TASKS = ("changes-small",)
HOW = ("--documents", "2", "--questions", "3", "--new-tokens", "4", "--window", "64", "--retrieval-chunk", "16")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    directory, tokenizer = tmp_path_factory.mktemp("models"), chatml_tokenizer()
    model = tiny_model(vocab_size=512, eos_token_id=tokenizer.eos_token_id, pad_token_id=0, max_position_embeddings=256)
    model.save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    for name in ("tsw", "msw"):
        patch_model(model, DeltaMemConfig.preset(name, output_init="random"), backend="reference")
        loud_adapter(model)
        save_adapter(model, directory / name)
        unpatch_model(model)
    return directory


def deltamem(place, output, *more, adapter="tsw", policies=("nothing", "bm25-1")):
    adapters = () if adapter is None else ("--adapter", str(place / adapter))
    command = ("eval", "run", str(place / "model"), "--task", *TASKS, "--policy", *policies, *adapters)
    return main([*command, "--backend", "reference", "--output", str(output), *HOW, *more])


def answers_of(output):
    return {
        path.relative_to(output).as_posix(): {one.id: one.answer for one in read_answer_file(path)[1].values()}
        for path in sorted(output.rglob("*.jsonl"))
    }


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory):
    """A run that nobody killed."""
    output = tmp_path_factory.mktemp("whole")
    assert deltamem(place, output, "--verify", "1") == 0
    return output


def test_rows_report_and_record(whole, place):
    rows = {path.stem for path in (whole / "scores" / "changes-small").iterdir()}
    assert rows == {"nothing+off", "bm25-1+off", "nothing+tsw", "bm25-1+tsw"}
    report = json.loads((whole / "report.json").read_text())
    found = report["tasks"][0]["rows"]
    assert [row["answered"] for row in found] == [6] * 4 and all(row["cost"] for row in found)
    record = json.loads((whole / "run.json").read_text())
    assert record["seed"] == 0 and record["versions"]["torch"] and len(record["data"]["changes-small"]) == 64
    assert set(record["verified"]["changes-small"]) == rows and record["left_out"] == {}
    assert all(one["holds"] and one["questions"] == 3 for one in record["verified"]["changes-small"].values())
    for name in ("report.md", "report.html", "cost.svg", "cost.png"):
        assert (whole / name).stat().st_size > 500


def test_a_killed_run_goes_on(whole, place, tmp_path, monkeypatch):
    """Killed between two answers of a row with a memory; the end is that of a run that was not."""
    real, left = answering.answer_documents, [9]

    def dying(*given, keep, **options):
        def kept(answer):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            keep(answer)

        return real(*given, keep=kept, **options)

    with monkeypatch.context() as short:
        short.setattr(run, "answer_documents", dying)
        assert deltamem(place, tmp_path) == 130
    before = answers_of(tmp_path)
    assert sum(map(len, before.values())) == 9
    asked = []
    counting = lambda *given, **options: asked.extend(found := real(*given, **options)) or found  # noqa: E731
    with monkeypatch.context() as counted:
        counted.setattr(run, "answer_documents", counting)
        assert deltamem(place, tmp_path) == 0
    assert len(asked) == 4 * 6 - 9 and answers_of(tmp_path) == answers_of(whole)
    scores = [path.read_text() for path in sorted((tmp_path / "scores").rglob("*.json"))]
    assert scores == [path.read_text() for path in sorted((whole / "scores").rglob("*.json"))]


def test_rows_are_added_and_nothing_is_asked_again(whole, place, tmp_path, monkeypatch):
    assert deltamem(place, tmp_path) == 0
    asked = []
    real = run.answer_documents
    monkeypatch.setattr(run, "answer_documents", lambda *g, **o: asked.extend(found := real(*g, **o)) or found)
    assert deltamem(place, tmp_path, "--no-frozen", adapter="msw", policies=("nothing",)) == 0
    assert sorted(one.id for one in asked) == sorted(answers_of(whole)["answers/changes-small/nothing+tsw.jsonl"])
    record = json.loads((tmp_path / "run.json").read_text())
    assert set(record["adapters"]) == {"tsw", "msw"} and record["policies"] == ["nothing", "bm25-1"]
    assert len(json.loads((tmp_path / "report.json").read_text())["tasks"][0]["rows"]) == 5


def test_other_arguments_do_not_go_on(whole, place, tmp_path, capsys):
    assert deltamem(place, tmp_path) == 0
    for more, named in (
        (("--seed", "1"), "seed"),
        (("--window", "32"), "settings.window"),
        (("--documents", "1"), "documents"),
    ):
        before = answers_of(tmp_path)
        assert deltamem(place, tmp_path, *more) == 2
        assert re.search(rf"{named}\S*: got .* another --output", capsys.readouterr().err)
        assert answers_of(tmp_path) == before


def test_another_checkpoint_in_the_same_place_does_not_go_on(place, tmp_path, capsys):
    shutil.copytree(place / "model", tmp_path / "model")
    output, record = tmp_path / "run", tmp_path / "run" / "run.json"
    assert deltamem(tmp_path, output, adapter=None, policies=("nothing",)) == 0
    before = json.loads(record.read_text())
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tuned.model.layers[-1].mlp.down_proj.weight.data[3:5] += 0.01
    tuned.save_pretrained(tmp_path / "model")
    assert deltamem(tmp_path, output, adapter=None, policies=("bm25-1",)) == 2
    assert re.search("weights: got .* another --output", capsys.readouterr().err)
    record.write_text(json.dumps({name: value for name, value in before.items() if name != "weights"}))  # an older one
    assert deltamem(tmp_path, output, adapter=None, policies=("bm25-1",)) == 0
    assert json.loads(record.read_text())["weights"] not in (before["weights"], "")


def test_what_does_not_fit_is_left_out_and_said(place, tmp_path, capsys):
    flags = ("--documents", "1", "--new-tokens", "200")
    assert deltamem(place, tmp_path, *flags, adapter=None, policies=("everything", "yarn")) == 0
    left_out = "left out: 1 of 1 documents, such as .*: policy everything: a prompt with its answer takes"
    assert re.search(left_out, capsys.readouterr().err)
    record = json.loads((tmp_path / "run.json").read_text())
    assert list(record["left_out"]["changes-small"]) == ["everything+off"]
    assert [row["row"] for row in json.loads((tmp_path / "report.json").read_text())["tasks"][0]["rows"]] == [
        "yarn+off"
    ]
    assert "trained on 256" in (tmp_path / "report.md").read_text()


def test_verify_that_fails_is_the_exit_code(place, tmp_path, monkeypatch):
    from deltamem_fast.eval import checking

    monkeypatch.setattr(checking, "difference", lambda first, second: 0.5)
    assert deltamem(place, tmp_path, "--verify", "1", policies=("nothing",)) == 1


def test_a_check_that_failed_stands_until_as_much_is_looked_at_again(place, tmp_path, monkeypatch):
    from deltamem_fast.eval import checking

    def row():
        return json.loads((tmp_path / "run.json").read_text())["verified"]["changes-small"]["nothing+tsw"]

    with monkeypatch.context() as inside:
        inside.setattr(checking, "difference", lambda first, second: 0.5)
        assert deltamem(place, tmp_path, "--verify", "2", policies=("nothing",)) == 1
    failed = row()
    for fewer in ((), ("--verify", "1")):
        assert deltamem(place, tmp_path, *fewer, policies=("nothing",)) == 1 and row() == failed
    assert deltamem(place, tmp_path, "--verify", "2", policies=("nothing",)) == 0
    assert row()["holds"] and row()["documents"] == 2


def test_rows_of_dense_retrieval_are_added_to_others(place, tmp_path, monkeypatch, capsys):
    from deltamem_fast.eval import plan as plans
    from deltamem_fast.eval import retrieval

    class Model:
        def encode(self, texts, **options):
            return np.array([[text.count(letter) for letter in "aeiou"] for text in texts], dtype=float)

    for module in (run, retrieval):
        monkeypatch.setattr(module, "load_embedder", lambda name: Model())
    monkeypatch.setattr(plans, "require", lambda packages, what: None)
    assert deltamem(place, tmp_path, adapter=None, policies=("nothing",)) == 0
    assert deltamem(place, tmp_path, "--embedder", "one", adapter=None, policies=("dense-1",)) == 0
    assert deltamem(place, tmp_path, adapter=None, policies=("bm25-1",)) == 0
    assert json.loads((tmp_path / "run.json").read_text())["settings"]["embedder"] == "one"
    assert len(json.loads((tmp_path / "report.json").read_text())["tasks"][0]["rows"]) == 3
    assert deltamem(place, tmp_path, "--embedder", "other", adapter=None, policies=("dense-2",)) == 2
    assert "settings.embedder: got 'other'" in capsys.readouterr().err


def test_too_little_memory_names_the_row_and_what_helps(place, tmp_path, capsys, monkeypatch):
    def answer_documents(*given, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(run, "answer_documents", answer_documents)
    assert deltamem(place, tmp_path, adapter=None) == 2
    said = capsys.readouterr().err
    assert "changes-small nothing+off: out of memory with batch_size 8; the same command with a smaller" in said
    monkeypatch.undo()
    assert deltamem(place, tmp_path, "--batch-size", "1", adapter=None) == 0


def test_a_model_without_an_adapter_runs_bare_and_says_so(place, tmp_path, capsys):
    assert deltamem(place, tmp_path, adapter=None, policies=("nothing",)) == 0
    assert "no adapter was given and none is shipped: without a memory only" in capsys.readouterr().err


@pytest.mark.xdist_group("lm_eval")
def test_a_row_of_lm_eval_goes_on_too(place, tmp_path, capfd):
    command = ["eval", "run", str(place / "model"), "--task", f"babilong-qa1={SAMPLES['babilong-qa1']}"]
    command += ["--policy", "last-16", "--adapter", str(place / "tsw"), "--backend", "reference", "--new-tokens", "3"]
    assert main([*command, "--output", str(tmp_path)]) == 0
    path = tmp_path / "answers" / "babilong-qa1" / "last-16+tsw.jsonl"
    whole, lines = answers_of(tmp_path), path.read_text().splitlines()
    assert len(lines) == 4
    path.write_text("\n".join(lines[:2]) + "\n" + lines[2][:20])  # killed in its second answer
    assert main([*command, "--output", str(tmp_path)]) == 0
    assert answers_of(tmp_path) == whole
    scores = json.loads((tmp_path / "scores" / "babilong-qa1" / "last-16+tsw.json").read_text())
    assert set(scores["scores"]) == set(next(iter(whole.values()))) and scores["title"] == "BABILong qa1"
    assert all(one.prefill_seconds > 0 and one.told_tokens > 0 for one in read_answer_file(path)[1].values())


def test_score_and_report_need_no_model(whole, tmp_path, capsys):
    answers = whole / "answers" / "changes-small" / "nothing+tsw.jsonl"
    assert main(["eval", "score", "changes-small", str(answers)]) == 0
    found = json.loads(capsys.readouterr().out)
    scores = json.loads((whole / "scores" / "changes-small" / "nothing+tsw.json").read_text())
    assert found["answered"] == 6 and found["scores"] == scores["scores"]
    (whole / "report.md").unlink()
    assert main(["eval", "report", str(whole)]) == 0
    assert (whole / "report.md").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--policy", "nothing", "most"), "policy: got 'most', allowed nothing, last-TOKENS"),
        (("--policy", "nothing", "nothing"), "policy: got nothing, nothing, allowed one or more, each once"),
        (("--policy", "dense-2"), "policy dense: needs the package sentence_transformers"),
        (("--task", "loco"), "task: got 'loco', allowed locomo, memory-agent-bench"),
        (("--task", "locomo"), "data of locomo: got no file.*snap-research/locomo"),
        (("--task", "locomo={root}/missing.json"), "missing.json: no such file"),
        (("--task", "gpqa={root}/missing.json"), "missing.json: no such file"),
        (("--task", "gpqa"), "task gpqa: from hub Idavidrein/gpqa.* gated: accept .* allowed, too: gpqa=FILE"),
        (("--task", "../x"), "task: got '../x'"),
        (("--adapter", "off=tsw"), "label: got 'off'"),
        (("--adapter", "a/b={root}/tsw"), "label: got 'a/b'"),
        (("--adapter", "{root}/tsw", "{root}/tsw"), "two with the label 'tsw', allowed each once: LABEL=ADAPTER"),
        (("--adapter", "{root}/nothing"), "adapter: .*nothing"),
        (("--no-frozen", "--adapter", "off"), "adapter: got none"),
        (("--documents", "0"), "documents: got 0, allowed an integer, 1 or more"),
        (("--chunk", "0"), "chunk: got 0"),
        (("--batch-size", "0"), "batch_size: got 0"),
        (("--policy", "dense-1", "--embedder", "x"), "policy dense: needs"),
        (("--verify", "-1"), "verify: got -1"),
        (("--template", "{{"), "--template: got"),
        (("--template", "[1]"), "--template: .*allowed a JSON object"),
        (("--judge", "http://localhost:1"), "--judge, --judge-model: got one of them"),
        (("--device", "tpu"), "device: got 'tpu'"),
        (("--output", ""), "--output: got ''"),
    ],
)
def test_mistakes_are_told_before_anything_is_made(place, tmp_path, capsys, monkeypatch, change, message):
    monkeypatch.setattr(run, "load_model", None)  # no model is read
    change = tuple(part.replace("{root}", str(place)).replace("{{", "{") for part in change)
    output = tmp_path / "run"
    command = ["eval", "run", str(place / "model"), "--task", "changes-small", "--output", str(output), *change]
    assert main(command) == 2
    assert re.search(message, capsys.readouterr().err) and not output.exists()


def test_a_model_that_cannot_be_loaded_leaves_no_directory(place, tmp_path, monkeypatch):
    def load_model(*given, **options):
        raise StateError("MODEL: no connection")

    monkeypatch.setattr(run, "load_model", load_model)
    assert deltamem(place, tmp_path / "run") == 2 and not (tmp_path / "run").exists()
    (tmp_path / "mine").mkdir()
    assert deltamem(place, tmp_path / "mine") == 2 and (tmp_path / "mine").exists()


def test_no_action_is_help(capsys):
    assert main(["eval"]) == 2
    assert "run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--window", "100000"), "window: got 100,000, allowed at most what the model was trained on, 256"),
        (("--window", "3"), "tokens: got 3"),
        (("--adapter", "{root}/other"), "adapter"),
    ],
)
def test_what_only_the_model_can_tell_is_told_before_the_first_row(place, tmp_path, capsys, more, message):
    other = tiny_model(vocab_size=512, hidden_size=32)
    patch_model(other, DeltaMemConfig.tsw(), backend="reference")
    save_adapter(other, place / "other")
    more = tuple(part.replace("{root}", str(place)) for part in more)
    adapter = None if "--adapter" in more else "tsw"
    assert deltamem(place, tmp_path, *more, adapter=adapter) == 2
    assert re.search(message, capsys.readouterr().err) and not list(tmp_path.rglob("*.jsonl"))


@pytest.mark.xdist_group("lm_eval")
def test_other_data_of_lm_evals_tasks_does_not_go_on(place, tmp_path, capsys):
    rows = SAMPLES["babilong-qa1"].read_text().splitlines()
    for count, code in ((1, 0), (2, 2)):
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(rows[:count]) + "\n")
        command = ["eval", "run", str(place / "model"), "--task", f"babilong-qa1={path}", "--new-tokens", "2"]
        assert main([*command, "--output", str(tmp_path / "run")]) == code
    assert re.search("data.babilong-qa1: got .* another --output", capsys.readouterr().err)


def test_a_judge_may_come_later_and_scores_all_rows(place, tmp_path, capsys, monkeypatch):
    from deltamem_fast.cli import eval as command

    asked, real = [], run.score_answers
    monkeypatch.setattr(command, "_judge_of", lambda arguments, kept: arguments.judge and (lambda *_: 1.0))
    monkeypatch.setattr(run, "score_answers", lambda *g: asked.append(len(g) > 3 and g[3] is not None) or real(*g))

    def judges():
        return {path.stem: json.loads(path.read_text())["judge"] for path in tmp_path.glob("scores/*/*.json")}

    def with_judge(name, policy):
        judge = ("--judge", "http://localhost:1", "--judge-model", name) if name else ()
        return deltamem(place, tmp_path, *judge, adapter=None, policies=(policy,))

    assert with_judge(None, "nothing") == 0 and judges() == {"nothing+off": None}
    before = answers_of(tmp_path)
    assert with_judge("first", "bm25-1") == 0
    assert judges() == {"nothing+off": "first", "bm25-1+off": "first"} and asked.count(True) == 2
    assert json.loads((tmp_path / "run.json").read_text())["judge"] == "first"
    assert with_judge("first", "bm25-1") == 0 and asked.count(True) == 2  # nothing is judged twice
    assert with_judge("second", "bm25-1") == 0 and set(judges().values()) == {"second"}
    assert with_judge(None, "bm25-1") == 2
    assert re.search("judge: got none, but .* has 'second'.* another --output, or a judge", capsys.readouterr().err)
    assert before.items() <= answers_of(tmp_path).items() and set(judges().values()) == {"second"}


def test_a_judge_that_fails_comes_when_all_is_answered(place, tmp_path, capsys, monkeypatch):
    real = run.score_answers

    def score(task, documents, answers, judge=None):
        if judge is not None:
            raise StateError("judge: http://localhost:1: no connection")
        return real(task, documents, answers)

    monkeypatch.setattr(run, "score_answers", score)
    judged = ("--judge", "http://localhost:1", "--judge-model", "one")
    assert deltamem(place, tmp_path, *judged) == 2
    assert "no connection" in capsys.readouterr().err
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["answered"] for row in report["tasks"][0]["rows"]] == [6] * 4


def test_two_runs_in_one_directory(place, tmp_path, capsys):
    with run._alone_in(tmp_path):
        assert deltamem(place, tmp_path) == 2
    assert f"output: {tmp_path}: another run writes into it" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    with pytest.raises(KeyError), run._alone_in(tmp_path):
        raise KeyError
