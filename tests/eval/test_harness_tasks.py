"""Our benchmarks as lm_eval's tasks, under any of its models, and under ours by their documents."""

from __future__ import annotations

import gc
import math
from dataclasses import replace

import pytest
from harness_support import ADAPTERS, Saying, evaluated, made

from deltamem_fast.errors import ArgumentError
from deltamem_fast.eval import harness, harness_tasks
from deltamem_fast.eval.answering import Settings, answer_documents
from deltamem_fast.eval.data import Document, Question, Task
from deltamem_fast.eval.harness import DeltaMemLM
from deltamem_fast.eval.harness_tasks import harness_task
from deltamem_fast.eval.policies import policy_named

pytestmark = pytest.mark.xdist_group("lm_eval")  # whose import takes seconds


DOCUMENTS = [
    Document(
        "first",
        ("My dog is called Rex.", "My sister lives in Paris. {question}"),
        (
            Question("first-0", "What is the name of my dog?", ("Rex",), "names"),
            Question("first-1", "Where does my {context} sister live?", ("Paris", "France"), "places", query="sister"),
            Question("first-2", "Was it a good day?", ("yes",), "judged"),
        ),
    ),
    Document("second", ("Ada took the train home.",), (Question("second-0", "Who took it?", ("Ada",), "names"),)),
]
PROMPT = "{context}\n\nAnswer in a word.\n{question}"


def score(question: Question, answer: str) -> float | None:
    return None if question.category == "judged" else float(answer in question.answers)


def load(path):
    if path is not None:
        raise ArgumentError(f"data: got {path}")
    return DOCUMENTS


TASK = Task("tiny", "Tiny", load, score, PROMPT, 5, "match")


def test_any_model():
    model = Saying(lambda prompt: "Rex" if "dog?" in prompt else "Ada" if "took it" in prompt else "Rome")
    found = evaluated(model, harness_task(TASK))
    assert model.asked[1][0] == (
        "My dog is called Rex.\n\nMy sister lives in Paris. {question}\n\nAnswer in a word.\n"
        "Where does my {context} sister live?"
    )
    assert [options for _, options in model.asked] == [{"until": [], "do_sample": False, "max_gen_toks": 5}] * 4
    results = found["results"]["deltamem_tiny"]
    assert results["match,none"] == pytest.approx(2 / 3)  # what a judge scores is in neither
    assert (results["match_names,none"], results["match_places,none"]) == (1.0, 0.0)
    assert "match_judged,none" not in results
    assert found["samples"]["deltamem_tiny"][1]["target"] == "Paris; France"
    assert (
        evaluated(Saying(lambda _: "Rex"), harness_task(TASK), limit=1)["results"]["deltamem_tiny"]["match,none"] == 1
    )


def test_what_a_benchmark_is_known_by():
    """Another mean than that over all questions, and questions with answers of another length."""

    def overall(scores):
        means = [sum(some) / len(some) for some in scores.values()]
        return {"overall": sum(means) / len(means) if len(means) == 2 else None, "other": 0.0}

    first, second = DOCUMENTS
    questions = (first.questions[0], replace(first.questions[1], more={"new_tokens": 9}))
    documents = [replace(first, questions=questions), second]
    task = replace(TASK, overall=overall)
    model = Saying(lambda prompt: "Rex" if "dog?" in prompt else "Ada" if "took it" in prompt else "Rome")
    results = evaluated(model, harness_task(task, documents=documents))["results"]["deltamem_tiny"]
    assert (results["match,none"], results["overall,none"]) == (pytest.approx(2 / 3), 0.5)
    assert [options["max_gen_toks"] for _, options in model.asked] == [5, 9, 5]
    found = evaluated(model, harness_task(task, documents=documents), limit=1, gen_kwargs={"max_gen_toks": 7})
    assert math.isnan(found["results"]["deltamem_tiny"]["overall,none"])
    assert model.asked[-1][1]["max_gen_toks"] == 7


def test_no_question():
    with pytest.raises(ArgumentError, match="documents: tiny: got no question"):
        harness_task(TASK, documents=[])
    with pytest.raises(ArgumentError, match="data: got here"):
        harness_task(TASK, "here")


def test_each_call_has_documents_of_its_own():
    """Two tasks of one name: each is asked of, and scored by, what it was made of; no two have one id."""
    first = harness_task(TASK, documents=DOCUMENTS[:1])
    second = harness_task(replace(TASK, score=lambda question, answer: 0.5), documents=[
        replace(DOCUMENTS[0], parts=("My cat is called Tom.",)), DOCUMENTS[1]
    ])  # fmt: skip
    found = []
    for task in (first, second):
        model = Saying(lambda prompt: "Rex")
        results = evaluated(model, task)["results"]["deltamem_tiny"]
        found.append((results["match,none"], model.asked[0][0].split(" is ")[0], len(model.asked)))
    assert found == [(0.5, "My dog", 3), (0.5, "My cat", 4)]
    question = replace(DOCUMENTS[1].questions[0], id="first-1")
    for documents, words in (
        ([*DOCUMENTS, replace(DOCUMENTS[1], id="first")], "two documents with the id 'first'"),
        ([DOCUMENTS[0], replace(DOCUMENTS[1], questions=(question,))], "two questions with the id 'first-1'"),
    ):
        with pytest.raises(ArgumentError, match=f"documents: tiny: got {words}, allowed one"):
            harness_task(TASK, documents=documents)


def test_documents_go_with_their_task():
    before = len(harness_tasks._OPENED)
    task = harness_task(TASK)
    assert len(harness_tasks._OPENED) == before + 1
    del task
    gc.collect()
    assert len(harness_tasks._OPENED) <= before


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return made(tmp_path_factory.mktemp("harness_tasks"))


@pytest.mark.parametrize("adapter", [None, *ADAPTERS])
@pytest.mark.parametrize("policy", ["nothing", "everything", "bm25-1", "last-4"])
def test_by_document(directory, adapter, policy, monkeypatch):
    """Under our model each document is told once, and its questions are answered as ``deltamem eval`` does it."""
    calls = []
    monkeypatch.setattr(harness, "answer_documents", lambda *a, **k: calls.append(a[3]) or answer_documents(*a, **k))
    path = None if adapter is None else str(directory / adapter)
    lm = DeltaMemLM(str(directory / "model"), path, backend="reference", device="cpu", policy=policy, batch_size=2)
    found = evaluated(lm, harness_task(TASK))
    (documents,) = calls
    assert [document.id for document in documents] == ["first", "second"]
    said = [sample["filtered_resps"][0] for sample in found["samples"]["deltamem_tiny"]]
    expected = answer_documents(
        lm.model,
        lm.tokenizer,
        TASK,
        DOCUMENTS,
        policy_named(policy),
        memory=adapter is not None,
        settings=Settings(batch=1),
    )
    assert said == [answer.answer for answer in expected]
    limited = evaluated(lm, harness_task(TASK), limit=2)
    assert [one.id for one in calls[1][0].questions] == ["first-0", "first-1"] and len(calls[1]) == 1
    assert [sample["filtered_resps"][0] for sample in limited["samples"]["deltamem_tiny"]] == said[:2]


def test_sampled_answers_go_the_common_way(directory, monkeypatch):
    monkeypatch.setattr(harness, "answer_documents", None)
    lm = DeltaMemLM(str(directory / "model"), str(directory / "tsw"), device="cpu", policy="nothing", batch_size=4)
    found = evaluated(lm, harness_task(TASK), gen_kwargs={"until": ["\n"]})
    assert len(found["samples"]["deltamem_tiny"]) == 4
