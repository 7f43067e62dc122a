"""deltamem as a model of lm-evaluation-harness: whose memory a request reads, what is written, and what hf answers."""

from __future__ import annotations

import subprocess
import sys

import lm_eval
import pytest
import torch
from harness_support import ADAPTERS, PROMPTS, asks, lines, made, pairs, texts
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager
from tokenizers_for_tests import chatml_tokenizer

import deltamem_fast.eval
from deltamem_fast import MemoryState, ingest, segment_ids_from_messages
from deltamem_fast.adapter.files import read_adapter
from deltamem_fast.adapter.record import identity_of, is_patched, memory_disabled
from deltamem_fast.errors import ArgumentError, ArgumentTypeError, DeltaMemError
from deltamem_fast.eval import harness
from deltamem_fast.eval.answers import Answer
from deltamem_fast.eval.harness import DeltaMemLM
from deltamem_fast.eval.harness_segments import prompt_segments
from deltamem_fast.eval.opening import strategy_of, with_strategy
from deltamem_fast.text.encode import encode_text

pytestmark = pytest.mark.xdist_group("lm_eval")  # whose import takes seconds
ENDS = (" to the market", " home", " Paris")
PAIRS = [(prompt, end) for prompt in PROMPTS for end in ENDS] + [("", "Ada went home")]
LONG = "My dog is called Rex and my sister lives in Paris. The user asks a question. " * 4


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return made(tmp_path_factory.mktemp("harness"))


@pytest.fixture(scope="module")
def opened(directory):
    """Models by adapter and policy, made once; each test sets the batch size that it wants."""
    found = {}

    def open_one(adapter: str | None, policy: str = "everything", rows: int = 1) -> DeltaMemLM:
        if (adapter, policy) not in found:
            path = None if adapter is None else str(directory / adapter)
            found[adapter, policy] = DeltaMemLM(
                str(directory / "model"), path, backend="reference", device="cpu", policy=policy
            )
        found[adapter, policy].batch_size_per_gpu = rows
        return found[adapter, policy]

    return open_one


def close(a, b) -> bool:
    return all(
        abs(x[0] - y[0]) < 1e-4 and x[1] == y[1] if isinstance(x, tuple) else abs(x - y) < 1e-4 for x, y in zip(a, b)
    )


CASES = [(adapter, "everything") for adapter in (None, *ADAPTERS)] + [(None, "nothing"), ("tsw", "nothing")]
CASES += [("ssw", "nothing")]


@pytest.mark.parametrize("adapter,policy", CASES)
def test_no_request_knows_of_another(opened, adapter, policy):
    """Alone, in another order, in other batches, and once more, each request is answered the same."""
    lm = opened(adapter, policy)
    alone = [lm.generate_until(asks([prompt]), disable_tqdm=True)[0] for prompt in PROMPTS]
    scored = lm.loglikelihood(pairs(PAIRS), disable_tqdm=True)
    for rows in (3, len(PAIRS)):
        lm = opened(adapter, policy, rows)
        assert lm.generate_until(asks(PROMPTS), disable_tqdm=True) == alone
        assert lm.generate_until(asks(PROMPTS[::-1]), disable_tqdm=True) == alone[::-1]
        assert close(lm.loglikelihood(pairs(PAIRS), disable_tqdm=True), scored)
        assert close(lm.loglikelihood(pairs(PAIRS[::-1]), disable_tqdm=True), scored[::-1])


@pytest.mark.parametrize("adapter", [None, *ADAPTERS])
def test_rolling(opened, adapter, monkeypatch):
    """Windows of a text run on in its memory, and in nobody else's."""
    lm = opened(adapter)
    monkeypatch.setattr(lm, "_max_length", 16)
    whole = [LONG, "Ada went home.", LONG[40:200], "a"]
    alone = [lm.loglikelihood_rolling(texts([text]), disable_tqdm=True)[0] for text in whole]
    for rows in (2, 4):
        together = opened(adapter, rows=rows).loglikelihood_rolling(texts(whole), disable_tqdm=True)
        assert close(together, alone)
    assert lm.loglikelihood_rolling(texts(["", "a", ""]), disable_tqdm=True)[::2] == [0.0, 0.0]  # as hf has it


@pytest.mark.parametrize("adapter", ["tsw", "ssw", "msw"])
def test_rolling_writes_each_token_once(opened, adapter, monkeypatch):
    """The last window, which is shorter, reaches back to nothing that was read: as one plain pass over windows."""
    lm = opened(adapter, rows=2)
    monkeypatch.setattr(lm, "_max_length", 16)
    ids = [lm.prefix_token_id, *lm.tok_encode(text := LONG + "Where did Ada go on Monday?")]
    assert (len(ids) - 1) % 16 > 1
    memory, total, fed = MemoryState.zeros(lm.model), 0.0, []
    with torch.no_grad():
        for first in range(0, len(ids) - 1, 16):
            window = torch.tensor([ids[first : min(first + 16, len(ids) - 1)]])
            segments = {"segment_ids": torch.zeros_like(window)} if lm.segmented else {}
            logits = lm.model(window, memory=memory, use_cache=False, **segments).logits[0].log_softmax(-1)
            total += float(logits.gather(1, torch.tensor(ids[first + 1 :][: len(logits)])[:, None]).sum())
    seen = []

    def watched(model, args, options):
        seen.append(options["memory"])
        fed.extend(args[0][0].tolist())

    with lm.model.register_forward_pre_hook(watched, with_kwargs=True):
        (found,) = lm.loglikelihood_rolling(texts([text]), disable_tqdm=True)
    assert fed == ids[:-1] and found == pytest.approx(total, abs=1e-3)
    assert all(torch.allclose(seen[-1][layer], memory[layer], atol=1e-5) for layer in memory)


def test_live_scores(opened):
    """TSW: one forward over both. SSW: the context is written, then the continuation reads it and is not."""
    context, end = PROMPTS[1], " Paris market"
    for adapter in ("tsw", "ssw"):
        lm = opened(adapter)
        ids, more = lm._encode_pair(context, end)
        with torch.no_grad():
            if adapter == "tsw":
                logits = lm.model(torch.tensor([ids + more])).logits[0, len(ids) - 1 : -1]
            else:
                memory = MemoryState.zeros(lm.model)
                segments = torch.zeros(1, len(ids), dtype=torch.int64)
                first = lm.model(torch.tensor([ids]), memory=memory, segment_ids=segments)
                before = memory.clone()
                rest = torch.tensor([more[:-1]])
                second = lm.model(rest, past_key_values=first.past_key_values, memory=memory, segment_ids=-1)
                assert all(torch.equal(before[i], memory[i]) for i in memory)
                logits = torch.cat([first.logits[0, -1:], second.logits[0]])
        expected = float(logits.log_softmax(-1).gather(1, torch.tensor(more)[:, None]).sum())
        ((found, _),) = lm.loglikelihood(pairs([(context, end)]), disable_tqdm=True)
        assert found == pytest.approx(expected, abs=1e-4)
        ((bare, _),) = opened(None).loglikelihood(pairs([(context, end)]), disable_tqdm=True)
        assert found != pytest.approx(bare, abs=1e-2)


@pytest.mark.parametrize("adapter", ["tsw", "ssw", "msw"])
def test_the_policy_tells_the_document_first(opened, adapter):
    """Under ``nothing`` the document is in the memory and the question alone in context; no memory: it is lost."""
    document, question = "My dog is called Rex. My sister lives in Paris.", "What is the name of my dog?"
    lm = opened(adapter, "nothing", rows=2)
    told = (document, "Ada went home.")
    answers = lm.generate_until(asks([f"{text}\n\n{question}" for text in told]), disable_tqdm=True)
    scores = lm.loglikelihood(pairs([(f"{text}\n\n{question}", " Rex") for text in told]), disable_tqdm=True)
    for text, answer, (score, _) in zip(told, answers, scores):
        memory = MemoryState.zeros(lm.model)
        ingest(lm.model, lm.tokenizer, memory, text)
        ids = torch.tensor([lm.tok_encode(question)])
        out = lm.model.generate(ids, memory=memory.read_only(), max_new_tokens=8, do_sample=False)
        said = lm.tok_decode(out[0, ids.shape[1] :].tolist())
        assert answer == said.split("</think>")[-1].lstrip()
        more = lm._encode_pair(question, " Rex")[1]
        both = torch.tensor([ids[0].tolist() + more])
        with torch.no_grad():
            logits = lm.model(both, memory=memory.read_only()).logits[0, ids.shape[1] - 1 : -1].log_softmax(-1)
        assert score == pytest.approx(float(logits.gather(1, torch.tensor(more)[:, None]).sum()), abs=1e-4)
    assert abs(scores[0][0] - scores[1][0]) > 1e-3
    bare = opened(None, "nothing").generate_until(asks([f"{document}\n\n{question}", question]), disable_tqdm=True)
    assert bare[0] == bare[1]


def test_a_memory_told_once_for_several_questions(opened, monkeypatch):
    lm = opened("tsw", "nothing", rows=1)
    told = []
    windows_of = harness.windows_of
    monkeypatch.setattr(harness, "windows_of", lambda *a: told.extend(a[2]) or windows_of(*a))
    document = "My dog is called Rex.\nMy sister lives in Paris."
    prompts = [f"{document}\n\nWhere is Ada?", f"{document}\n\nWho is Rex?", f"{document}\n\nWhere is Ada?"]
    answers = lm.generate_until(asks(prompts), disable_tqdm=True)
    assert told == [document]
    assert answers[0] == answers[2]  # answering in between has not changed what is remembered
    lm.generate_until(asks(prompts[:1]), disable_tqdm=True)
    assert told == [document] * 2  # a later run begins anew


def test_costs(opened):
    """By prompt, as fields of an answer; those of telling are the document's, however many ask about it."""
    lm = opened("tsw", "nothing", rows=2)
    document, questions = "My dog is called Rex.", ("Who is Rex?", "What is the name of my dog?")
    prompts = [f"{document}\n\n{question}" for question in questions]
    lm.generate_until(asks([*prompts, "a"], max_gen_toks=3), disable_tqdm=True)
    told = len(encode_text(lm.tokenizer, document, ADAPTERS["tsw"])[0][0])
    for prompt, question in zip(prompts, questions):
        cost = Answer("id", "", **lm.costs[prompt])
        assert (cost.context_tokens, cost.told_tokens) == (len(lm.tok_encode(question)), told)
        assert 1 <= cost.answer_tokens <= 3 and cost.peak_bytes > 0
        assert min(cost.prefill_seconds, cost.decode_seconds, cost.tell_seconds) > 0
    assert lm.costs[prompts[0]]["tell_seconds"] == lm.costs[prompts[1]]["tell_seconds"]
    assert (lm.costs["a"]["told_tokens"], lm.costs["a"]["tell_seconds"]) == (0, 0.0)


@pytest.mark.parametrize("adapter", [None, "tsw", "ssw"])
def test_a_prompt_without_a_document(opened, adapter):
    """It is whole under every policy, written while it is read, and what shares a batch with it changes nothing."""
    texts = (
        "Write about Ada.\n\nShe went to the market.\n\nDo not use commas.",
        "Where is Rex?\n(A) home\n(B) Paris\nSay:",
    )
    docs = ({"instruction_id_list": []}, {"Question": "Where is Rex?", "Incorrect Answer 1": "home"})
    options = {"until": [], "max_gen_toks": 8, "do_sample": False}
    asked = [Instance("generate_until", doc, (text, options), 0) for text, doc in zip(texts, docs)]
    scored = [Instance("loglikelihood", doc, (text, " home"), 0) for text, doc in zip(texts, docs)]
    known = opened(adapter, rows=4)
    expected = known.generate_until(asked, disable_tqdm=True), known.loglikelihood(scored, disable_tqdm=True)
    for policy in ("nothing", "last-4", "bm25-1"):
        lm = opened(adapter, policy, rows=4)
        alone = lm.generate_until(asks(PROMPTS[1:2]), disable_tqdm=True)
        mixed = [asked[0], *asks(PROMPTS[1:2]), asked[1]]
        answers = lm.generate_until(mixed, disable_tqdm=True)
        assert answers[::2] == expected[0] and answers[1:2] == alone
        for text in texts:
            cost = Answer("id", "", **lm.costs[text])
            assert (cost.context_tokens, cost.told_tokens) == (0, 0)
            assert cost.question_tokens == len(lm.tok_encode(text))
        assert close(lm.loglikelihood(scored, disable_tqdm=True), expected[1])


def test_tokens_of_an_answer(opened, monkeypatch):
    """To what ends it, whichever of several tokens that is, or to the text that stops it; padding is no answer."""
    lm = opened("tsw", "nothing", rows=3)
    one, other, pad = lm.eot_token_id, lm.tokenizer.convert_tokens_to_ids("<|eot|>"), lm.tokenizer.pad_token_id
    words = lm.tok_encode("Rex went home")
    stopped = lm.tok_encode("Rex\nwent")
    assert len({one, other, pad}) == 3
    rows = [[*words, one], [words[0], other], [words[0], other, pad, pad, pad], words, stopped]
    lengths = [len(words) + 1, 2, 2, len(words), len(lm.tok_encode("Rex\n"))]
    monkeypatch.setattr(lm.model.generation_config, "eos_token_id", [one, other])
    coming = []
    monkeypatch.setattr(
        type(lm).__mro__[1], "_model_generate", lambda self, context, *a, **k: torch.cat([context, coming.pop()], 1)
    )
    for row, length in zip(rows, lengths):
        coming.append(torch.tensor([row]))
        lm.generate_until(asks(["Who?"], until=["\n"]), disable_tqdm=True)
        assert lm.costs["Who?"]["answer_tokens"] == length
    thought = lm.tok_encode("Hm\nwell</think>Rex\nwent")  # what stops an answer may stand before it
    coming.append(torch.tensor([thought]))
    lm.generate_until(asks(["Who?"], until=["\n"]), disable_tqdm=True)
    assert lm.costs["Who?"]["answer_tokens"] == len(lm.tok_encode("Hm\nwell</think>Rex\n"))


def test_nothing_grows(opened):
    """A model that is used again knows no more than of its last evaluation, and of that all that it needs."""
    lm = opened("ssw", "nothing", rows=2)
    for name in ("Ada", "Rex", "Paris"):
        chats = [[{"role": "user", "content": f"{name} is here {n}.\n\nWho?"}] for n in range(3)]
        rendered = [lm.apply_chat_template(chat) for chat in chats]
        answers = [lm.generate_until(asks(rendered), disable_tqdm=True) for _ in range(2)]
        assert answers[0] == answers[1]
        scored = [lm.loglikelihood(pairs((text, "Rex") for text in rendered), disable_tqdm=True) for _ in range(2)]
        assert close(*scored)
        contexts = lm._contexts
        assert contexts._chats.keys() == set(rendered) and lm.costs.keys() == set(rendered)
        assert not (contexts._cut_chats or contexts._fields or contexts._cut or contexts._finders or lm._memories)


def test_a_disabled_memory_is_none(opened):
    known, bare = opened("ssw", "nothing", rows=2), opened(None, "nothing", rows=2)
    with memory_disabled(known.model):
        assert not known.remembers and known.get_model_info()["memory"] is None
        assert known.generate_until(asks(PROMPTS)) == bare.generate_until(asks(PROMPTS))
        assert close(known.loglikelihood(pairs(PAIRS)), bare.loglikelihood(pairs(PAIRS)))
    assert known.remembers


def test_segments_of_a_rendered_chat(opened, monkeypatch):
    """The prompt's messages are the segments, also padded in a batch; the header of the answer is not written."""
    lm = opened("ssw", rows=2)
    chats = [
        [{"role": "user", "content": "My dog is called Rex."}],
        [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": "My sister lives in Paris. Where did Ada go?"},
            {"role": "assistant", "content": "She went home."},
            {"role": "user", "content": "What is her name?"},
        ],
    ]
    rendered = [lm.apply_chat_template(chat) for chat in chats]
    seen = []
    original = type(lm).__mro__[1]._model_generate
    monkeypatch.setattr(
        type(lm).__mro__[1], "_model_generate", lambda self, *a, **k: seen.append(k) or original(self, *a, **k)
    )
    lm.generate_until(asks(rendered), disable_tqdm=True)
    (given,) = seen
    rows = {}
    for chat, text in zip(chats, rendered):
        _, segments = segment_ids_from_messages(lm.tokenizer, chat, "message", add_generation_prompt=True)
        rows[text] = segments[0].tolist()
    width = given["segment_ids"].shape[1]
    expected = [[-1] * (width - len(rows[text])) + rows[text] for text in sorted(rows, key=lambda t: -len(rows[t]))]
    assert given["segment_ids"].tolist() == expected
    assert expected[0][-1] == -1 and max(expected[0]) == 2


@pytest.mark.parametrize("length", [None, 24])
def test_segments_of_a_chat_that_is_scored(opened, monkeypatch, length):
    """lm_eval puts the white space at the header's end before what is scored; the messages are the segments still."""
    lm = opened("ssw", rows=2)
    if length:
        monkeypatch.setattr(lm, "_max_length", length)
    chats = [
        [{"role": "user", "content": "My dog is called Rex. What is the name of my dog?"}],
        [
            {"role": "user", "content": "My sister lives in Paris. Where did Ada go?"},
            {"role": "assistant", "content": "She went home."},
            {"role": "user", "content": "What is her name?"},
        ],
    ]
    rendered = [lm.apply_chat_template(chat) for chat in chats]
    assert all(text[-1].isspace() for text in rendered)
    seen, expected = [], {}
    with lm.model.register_forward_pre_hook(lambda m, args, options: seen.append((args[0], options)), with_kwargs=True):
        lm.loglikelihood(pairs((text, "Rex") for text in rendered), disable_tqdm=True)
    for chat, text in zip(chats, rendered):
        ids, segments = segment_ids_from_messages(lm.tokenizer, chat, "message", add_generation_prompt=True)
        context, end = lm._encode_pair(text, "Rex")
        assert context == ids[0, : len(context)].tolist() and len(context) < ids.shape[1]
        start = max(0, len(context) + len(end) - 1 - length) if length else 0
        start = min(start, len(context) - 1)
        expected[tuple(context[start:])] = segments[0, start : len(context)].tolist()
    found = {}
    for row, segments in zip(seen[0][0].tolist(), seen[0][1]["segment_ids"].tolist()):
        kept = next(tuple(row[-n:]) for n in range(len(row), 0, -1) if tuple(row[-n:]) in expected)
        found[kept] = segments[-len(kept) :]
        assert set(segments[: -len(kept)]) <= {-1}
    assert found == expected
    assert len({id for row in found.values() for id in row}) >= 3  # a header, and messages


def test_segments_of_plain_text():
    tokenizer = chatml_tokenizer()
    text = "My dog is called Rex. My sister lives in Paris."
    ids = tokenizer(text)["input_ids"]
    assert set(prompt_segments(tokenizer, ids, text, "message_mean")) == {0}
    by_sentence = prompt_segments(tokenizer, ids, text, "sentence_mean")
    plain = chatml_tokenizer()
    plain.chat_template = None
    known, segments = encode_text(plain, text, ADAPTERS["sentence"])  # as what is told has them
    assert (ids, by_sentence) == (known[0].tolist(), segments[0].tolist())
    assert set(by_sentence) == {0, 1}
    assert prompt_segments(tokenizer, ids[5:], text, "sentence_mean") == by_sentence[5:]  # cut off on the left
    assert prompt_segments(tokenizer, [1, *ids], text, "sentence_mean") == [-1, *by_sentence]  # a bos token
    assert prompt_segments(tokenizer, [7, 8, 9], text, "sentence_mean") == [0, 0, 0]
    behind = text + "\n \n"  # white space, which lm_eval puts elsewhere
    assert prompt_segments(tokenizer, ids, behind, "sentence_mean") == by_sentence
    assert prompt_segments(tokenizer, ids[7:], behind, "sentence_mean") == by_sentence[7:]
    chat = [{"role": "user", "content": text}]
    whole = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) + "The answer"
    ids = tokenizer(whole)["input_ids"]
    found = prompt_segments(tokenizer, ids, whole, "sentence_mean", chat)
    _, known = segment_ids_from_messages(tokenizer, chat, "sentence", add_generation_prompt=True)
    assert found == known[0].tolist() + [-1] * (len(ids) - known.shape[1])
    assert prompt_segments(tokenizer, ids[3:], whole, "sentence_mean", chat) == found[3:]
    whole = whole.removesuffix("The answer")
    ids = tokenizer(whole.rstrip())["input_ids"]
    assert prompt_segments(tokenizer, ids, whole, "sentence_mean", chat) == known[0, : len(ids)].tolist()
    assert prompt_segments(tokenizer, [1, *ids], whole, "sentence_mean", chat) == [-1, *known[0, : len(ids)].tolist()]


CHOICES = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{text}}",
    "doc_to_choice": ["market", "home", "Paris"],
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
SAYS = {
    "output_type": "generate_until",
    "doc_to_text": "{{text}}",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
ROLLS = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}],
}


def run(directory, model: str, arguments: dict, **options) -> dict:
    """Samples and results of three tasks on local data."""
    data = lines(directory / "data.jsonl", [{"text": text, "answer": i % 3} for i, text in enumerate((*PROMPTS, LONG))])
    tasks = [
        {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(directory / "cache")},
            "test_split": "test",
        }
        | config
        for name, config in (("choices", CHOICES), ("says", SAYS), ("rolls", ROLLS))
    ]
    found = lm_eval.simple_evaluate(
        model=model,
        model_args={"pretrained": str(directory / "model")} | arguments,
        tasks=tasks,
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
        device="cpu",
        **options,
    )
    return found


def said(found: dict) -> dict:
    return {name: [sample["filtered_resps"] for sample in rows] for name, rows in found["samples"].items()}


def test_bare_as_hf(directory):
    """Without an adapter everything is what lm_eval's own model finds, number for number; the tokenizer thinks."""
    for options in ({"batch_size": 1}, {"batch_size": 4, "apply_chat_template": True}):
        ours = run(directory, "deltamem", {}, **options)
        theirs = run(directory, "hf", {"think_end_token": "</think>"}, **options)
        assert ours["results"] == theirs["results"]
        assert said(ours) == said(theirs)
    assert ours["config"]["memory"] is None and ours["config"]["policy"] == "everything"


def test_simple_evaluate_with_a_memory(directory):
    arguments = {"adapter": str(directory / "tsw"), "backend": "reference"}
    first, second = (run(directory, "deltamem", arguments, batch_size=2) for _ in range(2))
    assert said(first) == said(second) and first["results"] == second["results"]
    assert said(first) != said(run(directory, "deltamem", {}))
    assert first["config"]["memory"]["strategy"] == "tsw"
    limited = run(directory, "deltamem", arguments | {"strategy": "ssw"}, limit=2, apply_chat_template=True)
    assert limited["config"]["memory"]["strategy"] == "ssw"
    assert limited["n-samples"]["says"]["effective"] == 2


def test_arguments_as_one_string(directory):
    lm = get_model("deltamem").create_from_arg_string(
        f"pretrained={directory / 'model'},adapter={directory / 'tsw'},backend=reference,strategy=ssw-sentence,"
        "policy=nothing,max_length=64,dtype=float32,attention=eager",
        {"batch_size": 2, "max_batch_size": None, "device": "cpu"},
    )
    config = identity_of(lm.model).config
    assert config.memory_write_granularity == "sentence_mean"
    assert (lm.max_length, lm.batch_size, lm.policy.name) == (64, 2, "nothing")
    assert lm.model.config._attn_implementation == "eager"


def test_a_model_that_is_there(opened):
    known = opened("tsw")
    lm = DeltaMemLM(known.model, tokenizer=known.tokenizer)
    assert lm.remembers and is_patched(lm.model)
    answers = [one.generate_until(asks(PROMPTS[:2]), disable_tqdm=True) for one in (lm, known)]
    assert answers[0] == answers[1]
    with pytest.raises(ArgumentTypeError, match="tokenizer: got None"):
        DeltaMemLM(known.model)
    with pytest.raises(ArgumentError, match="patch it before"):
        DeltaMemLM(known.model, "smollm2/tsw", tokenizer=known.tokenizer)


def test_refused(directory):
    model = str(directory / "model")
    for given, words in (
        ({"adapter": "msw", "strategy": "tsw"}, "strategy: got 'tsw', but .* has 2 memory head"),
        ({"adapter": "tsw", "strategy": "msw"}, "strategy: got 'msw', but .* has 1 memory head"),
        ({"strategy": "tsw"}, "strategy: got 'tsw' without adapter"),
        ({"adapter": "tsw", "strategy": "xsw"}, "strategy: got 'xsw', allowed tsw, ssw, ssw-sentence, msw"),
        ({"policy": "most"}, "policy: got 'most'"),
        ({"parallelize": True}, "parallelize: which deltamem does not take"),
        ({"adaptor": "tsw"}, "adaptor: unknown; allowed pretrained, adapter"),
        ({"backend": "cuda"}, "backend: got 'cuda'"),
    ):
        if "adapter" in given:
            given = given | {"adapter": str(directory / given["adapter"])}
        with pytest.raises(DeltaMemError, match=words):
            DeltaMemLM(model, device="cpu", **given)


def test_register():
    """The package is cheap to import, and registering twice changes nothing."""
    deltamem_fast.eval.register()
    assert get_model("deltamem") is DeltaMemLM
    program = (
        "import sys, deltamem_fast.eval as e\n"
        "assert not {'torch', 'transformers', 'lm_eval', 'datasets'} & set(sys.modules)\n"
        "e.register(); e.register()\n"
        "from lm_eval.api.registry import model_registry\n"
        "assert 'hf' in model_registry and 'deltamem' in model_registry\n"
        "assert 'deltamem_fast.eval.harness' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_strategies_of_the_shipped_adapters():
    """The same weights under another way to write; of a known model a strategy names the shipped adapter."""
    for name, strategy, granularity in (
        ("tsw", "ssw", "message_mean"),
        ("tsw", "ssw-sentence", "sentence_mean"),
        ("ssw", "tsw", "token"),
        ("ssw", "ssw", read_adapter("smollm2/ssw").config.memory_write_granularity),
        ("msw", "msw", "token"),
    ):
        source = read_adapter(f"smollm2/{name}")
        changed = with_strategy(source, strategy)
        assert changed.config.memory_write_granularity == granularity
        assert (changed.directory, changed.config.num_state_heads) == (source.directory, source.config.num_state_heads)
        assert read_adapter(changed) is changed
        assert strategy_of(changed.config) in (strategy, "ssw-sentence")
    with pytest.raises(ArgumentError, match="strategy: got 'ssw', but smollm2/msw has"):
        with_strategy(read_adapter("smollm2/msw"), "ssw")
