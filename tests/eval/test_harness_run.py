"""A row of a benchmark of lm_eval: all settings count, and a run that goes on is the run that was not killed."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from harness_support import asks, made
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from support import loud_adapter, tiny_model
from tokenizers_for_tests import chatml_tokenizer

from deltamem_fast import DeltaMemConfig, patch_model
from deltamem_fast.cli.main import main
from deltamem_fast.errors import ArgumentError
from deltamem_fast.eval import harness, harness_context, paper
from deltamem_fast.eval.answering import Settings
from deltamem_fast.eval.answers import AnswerFile, read_answer_file
from deltamem_fast.eval.harness import DeltaMemLM
from deltamem_fast.eval.harness_run import harness_row
from deltamem_fast.eval.paper import SAMPLES, open_task
from deltamem_fast.eval.policies import policy_named

pytestmark = pytest.mark.xdist_group("lm_eval")  # whose import takes seconds


def model_of(length: int, *, patched: bool = False):
    model = tiny_model(vocab_size=512, eos_token_id=2, pad_token_id=0, max_position_embeddings=length)
    if patched:
        patch_model(model, DeltaMemConfig.tsw(output_init="random"), backend="reference")
        loud_adapter(model)
    return model


def row(model, place, name: str, policy: str = "everything", *, path="sample", **settings):
    """What ``harness_row`` returns, and the answers in the file afterwards, by id."""
    path = SAMPLES[name] if path == "sample" else path
    settings = Settings(**{"batch": 2} | settings)
    tokenizer = chatml_tokenizer()
    task, _ = open_task(name, path, tokenizer)
    with AnswerFile(place / "row.jsonl", {"task": name}) as file:
        found = harness_row(
            model, tokenizer, name, task, policy_named(policy), file, pretrained="tiny", settings=settings
        )
        return found, {id: answer.answer for id, answer in file.answers.items()}


@pytest.fixture
def asked(monkeypatch):
    """The requests that were run; they are all answered at once by the same."""
    found = []

    def answered(self, requests, disable_tqdm=False):
        found.extend(requests)
        for request in requests:
            self.cache_hook.add_partial("generate_until", request.args, "so")
        return ["so"] * len(requests)

    monkeypatch.setattr(DeltaMemLM, "generate_until", answered)
    return found


def test_positions_of_a_run_that_goes_on(tmp_path, monkeypatch):
    """YaRN's factor is that of the longest of all requests, also when it has been answered before."""
    real, lengths = harness.extended, []
    monkeypatch.setattr(harness, "extended", lambda model, length: lengths.append(length) or real(model, length))
    model = model_of(64)
    found, whole = row(model, tmp_path, "babilong-qa1", "yarn", new_tokens=4)
    assert len(whole) == 3 and lengths[0] > 64 and found["notes"] == []
    lines = (tmp_path / "row.jsonl").read_text().splitlines(keepends=True)
    for kept in lines[1:]:  # one of the three is the longest
        (tmp_path / "row.jsonl").write_text(lines[0] + kept)
        again, answers = row(model, tmp_path, "babilong-qa1", "yarn", new_tokens=4)
        assert (again["scores"], answers) == (found["scores"], whole)
    assert len(lengths) == 4 and len(set(lengths)) == 1
    lm = DeltaMemLM(model, tokenizer=chatml_tokenizer(), policy="yarn")
    lm.generate_until(asks(["a"], max_gen_toks=3))
    lm.least_length = 100
    lm.generate_until(asks(["a"], max_gen_toks=3))
    assert lengths[4:] == [4, 100] == [lm.length_of(asks(["a"], max_gen_toks=3)[0]), 100]


def test_tokens_of_an_answer(tmp_path, asked):
    """Those of the settings, else the benchmark's, at most half of what the model sees; else lm_eval's."""
    for place, (length, name, given, expected, note) in enumerate(
        (
            (8192, "gpqa", 0, 2048, None),
            (8192, "gpqa", 5, 5, None),
            (256, "gpqa", 0, 128, "answers had 128 tokens instead of 2,048: the model sees 256"),
            (8192, "babilong-qa1", 0, 16, None),
        )
    ):
        asked.clear()
        found, answers = row(model_of(length), tmp_path / str(place), name, new_tokens=given)
        assert {request.args[1]["max_gen_toks"] for request in asked} == {expected} and set(answers.values()) == {"so"}
        assert (note in found["notes"]) if note else not any("instead of" in one for one in found["notes"])
    with pytest.raises(ArgumentError, match="new_tokens: got 256, allowed less than 256"):
        row(model_of(256), tmp_path / "long", "gpqa", new_tokens=256)


def test_prompts_that_are_cut_are_told(tmp_path, asked):
    found, _ = row(model_of(64), tmp_path / "a", "babilong-qa1")
    assert found["notes"] == ["3 of 3 prompts were longer than 48 tokens and cut at their beginning"]
    assert row(model_of(8192), tmp_path / "b", "babilong-qa1")[0]["notes"] == []
    lm = DeltaMemLM(model_of(64), tokenizer=chatml_tokenizer(), max_length=20)
    prompts = ["a" * n for n in range(1, 40)]
    lengths = [len(lm.tok_encode(text)) for text in prompts]
    assert min(lengths) < 15 < max(lengths)
    assert lm.cut_off(asks(prompts, max_gen_toks=5)) == (sum(length > 15 for length in lengths), 15)
    lm = DeltaMemLM(model_of(64), tokenizer=chatml_tokenizer(), max_length=20, policy="nothing")
    assert lm.cut_off(asks(["Ada went home. " * 20 + "\n\nWho?"], max_gen_toks=5)) == (0, 15)
    lm = DeltaMemLM(model_of(64), tokenizer=chatml_tokenizer(), max_length=20, policy="yarn")
    assert lm.cut_off(asks(prompts, max_gen_toks=5)) == (0, 0)


@pytest.mark.parametrize("name", ["ifeval", "gpqa"])
def test_a_benchmark_without_documents_is_asked_once(tmp_path, name):
    """Whatever the policies, as its prompts stand; the memory is written while they are read; the digest is kept."""
    directory, output = made(tmp_path), tmp_path / "out"
    command = ["eval", "run", str(directory / "model"), "--task", f"{name}={SAMPLES[name]}", "--new-tokens", "4"]
    command += ["--backend", "reference", "--output", str(output), "--adapter", str(directory / "tsw")]
    assert main([*command, "--policy", "bm25-1", "everything", "last-4"]) == 0
    rows = {path.stem: path for path in (output / "answers" / name).iterdir()}
    assert rows.keys() == {"nothing+off", "nothing+tsw"}
    found = {row: read_answer_file(path) for row, path in rows.items()}
    tokenizer = chatml_tokenizer()
    task, digest = open_task(name, SAMPLES[name], tokenizer)
    prompts = [tokenizer.apply_chat_template([{"role": "user", "content": task.doc_to_text(doc)}], tokenize=False,
                                             add_generation_prompt=True) for doc in task.eval_docs]  # fmt: skip
    for row, (head, answers) in found.items():
        assert (head["policy"], head["data"], len(answers)) == ("nothing", digest, len(prompts))
        assert {(one.context_tokens, one.told_tokens) for one in answers.values()} == {(0, 0)}
        kept = [answers[f"{name}-{n}"] for n in range(len(prompts))]
        lengths = [len(tokenizer(text)["input_ids"]) for text in prompts]
        assert [one.question_tokens for one in kept] == lengths
        path = None if row == "nothing+off" else str(directory / "tsw")
        lm = DeltaMemLM(str(directory / "model"), path, backend="reference", device="cpu")  # everything, and no more
        whole = lm.generate_until(asks(prompts, max_gen_toks=4), disable_tqdm=True)
        assert [one.answer for one in kept] == whole
    said = [{one.id: one.answer for one in answers.values()} for _, answers in found.values()]
    assert said[0] != said[1]
    scores = json.loads((output / "scores" / name / "nothing+tsw.json").read_text())
    assert any("no document" in note for note in scores["notes"])


def test_settings_count(tmp_path, monkeypatch):
    """How documents are told, and what retrieval finds in them."""
    seen = {}

    def noting(place, name, **positions):
        real = getattr(place, name)

        def noted(*given, **options):
            known = options | {key: given[at] for key, at in positions.items() if at < len(given)}
            seen.setdefault(name, set()).add(tuple(known.get(key) for key in (*positions, "chunk")))
            return real(*given, **options)

        monkeypatch.setattr(place, name, noted)

    noting(harness, "windows_of", window=3)
    noting(harness, "remember")
    noting(harness_context, "chunks_of", tokens=2)
    monkeypatch.setattr(
        harness_context, "finder_for", lambda *given: seen.setdefault("embedder", given[2]) and (lambda _: [0])
    )
    settings = {"window": 48, "chunk": 16, "chunk_tokens": 24, "embedder": "mine", "new_tokens": 2}
    row(model_of(2048, patched=True), tmp_path, "babilong-qa1", "dense-1", **settings)
    assert seen == {"windows_of": {(48, None)}, "remember": {(16,)}, "chunks_of": {(24, None)}, "embedder": "mine"}


def test_settings_as_one_string(tmp_path):
    directory = made(tmp_path)
    text = f"pretrained={directory / 'model'},window=32,chunk=8,chunk_tokens=12,embedder=mine"
    lm = get_model("deltamem").create_from_arg_string(text, {"device": "cpu"})
    assert lm._telling == {"window": 32, "chunk": 8, "chunk_tokens": 12, "embedder": "mine"}
    known = {"tokenizer": chatml_tokenizer()}
    assert DeltaMemLM(model_of(64), window="32", **known)._telling["window"] == 32
    for given, words in (
        ({"chunk": 0}, "chunk: got 0"),
        ({"window": "x"}, "window: got 'x'"),
        ({"chunk_tokens": -1}, "-1"),
    ):
        with pytest.raises(ArgumentError, match=words):
            DeltaMemLM(model_of(64), **known, **given)


def test_ruler_loads_no_tokenizer(tmp_path, asked, monkeypatch):
    """Its rows are made with the one that is there: nothing beside the model decides what code runs."""

    def loads(*given, **options):
        raise AssertionError(given)

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", loads)
    make = paper.MAKERS["ruler-niah"]

    def short(tokenizer, length, samples):  # to 4,096 tokens it takes seconds
        assert (length, samples) == (4096, 500)
        return [one | {"max_length": length} for one in make(tokenizer, 900, 2)]

    monkeypatch.setitem(paper.MAKERS, "ruler-niah", short)
    found, answers = row(model_of(8192), tmp_path, "ruler-niah", path=None)
    assert list(answers) == list(found["scores"]) == ["ruler-niah-0", "ruler-niah-1"]
    assert found["metric"] == "4096" and found["aggregate"] == {"overall": 0.0}
    tokenizer = chatml_tokenizer()
    lengths = [len(tokenizer(request.doc["input"])["input_ids"]) + 128 for request in asked]
    assert lengths == [request.doc["length"] for request in asked] and max(lengths) <= 900


@pytest.mark.parametrize("special", [False, True])
def test_what_is_thought_is_no_answer(monkeypatch, special):
    tokenizer = chatml_tokenizer()
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": ["</think>"]})
    said = ["<think>Rex? No.</think>\n\nParis", "Paris", "a</think>b</think> Paris"]
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in said]
    lm = DeltaMemLM(model_of(64), tokenizer=tokenizer)
    monkeypatch.setattr(HFLM, "_model_generate", lambda self, context, *a, **k: torch.cat([context, coming.pop()], 1))
    for ids in rows:
        coming = [torch.tensor([ids])]
        assert lm.generate_until(asks(["Where?"]), disable_tqdm=True) == ["Paris"]
    lm = DeltaMemLM(model_of(64), tokenizer=tokenizer, think_end_token="Pa")  # the caller's own
    coming = [torch.tensor([rows[1]])]
    assert lm.generate_until(asks(["Where?"]), disable_tqdm=True) == ["ris"]
    assert DeltaMemLM(model_of(64), tokenizer=tokenizer, enable_thinking=True).enable_thinking
