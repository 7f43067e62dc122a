"""Answers under each policy: what is in context, what the memory holds, what leaks (nothing), and what it cost."""

import weakref
from dataclasses import replace

import pytest
import torch
from support import loud_adapter, tiny_model
from tokenizers_for_tests import chatml_tokenizer

from deltamem_fast import DeltaMemConfig, MemoryState, patch_model
from deltamem_fast.errors import DeltaMemError
from deltamem_fast.eval.answering import DoesNotFit, Prepared, Settings, answer_documents, copied
from deltamem_fast.eval.checking import verify
from deltamem_fast.eval.data import Document, Question, Task
from deltamem_fast.eval.policies import policy_named

QUESTIONS = ("What is the name of my dog?", "Where does my {sister} live?", "Who took the train?", "a", "1")


def document(name, *parts):
    return Document(name, parts, tuple(Question(f"{name}-{i}", text, ("x",)) for i, text in enumerate(QUESTIONS)))


DOCUMENTS = [
    document("first", "My dog is called Rex. It was a good day.", "  ", "My sister lives in Paris."),
    document("second", "Ada took the train home. She went to the market; then she took the train."),
    document("third", "The user asks a question and the assistant answers it. " * 4, "My dog is called Ada."),
]
TASK = Task("tiny", "Tiny", lambda path: DOCUMENTS, lambda q, a: 0.0, "Read {context}\n\n{question}", 6, "match")
SETTINGS = Settings(window=48, chunk=9, batch=2, chunk_tokens=12)
POLICIES = ("nothing", "last-10", "last-500", "everything", "bm25-1", "yarn")
TOKENIZER = chatml_tokenizer()


def made(config=None, **changes):
    model = tiny_model(vocab_size=512, eos_token_id=TOKENIZER.eos_token_id, pad_token_id=0, **changes)
    return model if config is None else loud_adapter(patch_model(model, config, backend="reference"))


@pytest.fixture(scope="module", params=["tsw", "ssw", "msw"])
def patched(request):
    return made(DeltaMemConfig.preset(request.param, output_init="random"))


def answered(model, policy, *, memory=True, documents=DOCUMENTS, settings=SETTINGS, **options):
    return answer_documents(
        model, TOKENIZER, TASK, documents, policy_named(policy), memory=memory, settings=settings, **options
    )


def texts(answers):
    return {answer.id: answer.answer for answer in answers}


@pytest.mark.parametrize("policy", POLICIES)
def test_batches_chunks_order_and_company_change_nothing(patched, policy):
    every = texts(answered(patched, policy))
    assert len(every) == 15
    alone = Settings(window=48, chunk=1000, batch=1, chunk_tokens=12)
    assert texts(answered(patched, policy, settings=alone)) == every
    assert texts(answered(patched, policy, documents=DOCUMENTS[::-1])) == every
    last = [replace(one, questions=one.questions[3:]) for one in DOCUMENTS[1:]]  # as a run that goes on
    found = texts(answered(patched, policy, documents=last))
    assert found == {id: every[id] for id in found} and len(found) == 4
    one = [replace(DOCUMENTS[0], questions=DOCUMENTS[0].questions[1:2])]
    assert texts(answered(patched, policy, documents=one)) == {"first-1": every["first-1"]}


@pytest.mark.parametrize("policy", POLICIES)
def test_equals_plain_forwards(patched, policy):
    found = verify(patched, TOKENIZER, TASK, DOCUMENTS, policy_named(policy), memory=True, settings=SETTINGS)
    assert found.holds and found.documents == 3 and found.questions == 15 and found.tokens == 0


def test_verify_sees_what_is_wrong(patched, monkeypatch):
    from deltamem_fast.eval import checking

    monkeypatch.setattr(checking, "tell_plainly", lambda model, windows: MemoryState.zeros(model))
    found = verify(patched, TOKENIZER, TASK, DOCUMENTS[:1], policy_named("nothing"), memory=True, settings=SETTINGS)
    assert not found.holds and found.states == 1


@pytest.mark.parametrize("policy", POLICIES)
def test_without_a_memory_it_is_the_bare_model(patched, policy):
    bare = made()
    assert texts(answered(patched, policy, memory=False)) == texts(answered(bare, policy, memory=False))


@pytest.mark.parametrize("policy", ["nothing", "last-10", "everything", "bm25-1"])
def test_the_memory_is_read(patched, policy):
    assert texts(answered(patched, policy)) != texts(answered(patched, policy, memory=False))


def test_state_only_is_ingest_and_retrieve(patched):
    """The operators of the package give the same answers."""
    from deltamem_fast import ingest, retrieve

    memory = MemoryState.zeros(patched)
    text = [{"role": "user", "content": part} for part in DOCUMENTS[0].parts if part.strip()]
    ingest(patched, TOKENIZER, memory, text, tokens=48)
    found = texts(answered(patched, "nothing", documents=DOCUMENTS[:1]))
    for question in DOCUMENTS[0].questions:
        said = retrieve(patched, TOKENIZER, memory, question.text, max_new_tokens=6, do_sample=False)
        assert found[question.id] == said.strip()


@torch.no_grad()
@pytest.mark.parametrize("policy", ["everything", "last-10", "nothing", "bm25-1"])
def test_answers_of_the_bare_model_are_generates(policy):
    """One prompt, one generate: the same text as by chunks on a cache that questions share."""
    model = made()
    run = Prepared(model, TOKENIZER, TASK, DOCUMENTS[2], policy_named(policy), SETTINGS, False)
    found = texts(answered(model, policy, memory=False, documents=DOCUMENTS[2:]))
    for asked in run.asked:
        ids = torch.tensor([[*run.shared, *asked.ids]])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        tokens = out[0, ids.shape[1] :].tolist()
        assert found[asked.question.id] == run._answer(
            asked, [token for token in tokens if token != TOKENIZER.eos_token_id]
        )


def test_what_is_in_context():
    model = made()

    def prompts(policy):
        run = prepared(policy)
        return [TOKENIZER.decode([*run.shared, *asked.ids]) for asked in run.asked]

    def prepared(policy, memory=False, of=model, which=0):
        return Prepared(of, TOKENIZER, TASK, DOCUMENTS[which], policy_named(policy), SETTINGS, memory)

    assert "Read" not in prompts("nothing")[0] and "Rex" not in prompts("nothing")[0]
    assert all(
        "Rex" in text and "Paris" in text and "{sister}" in prompts("everything")[1] for text in prompts("everything")
    )
    assert "Paris" in prompts("last-10")[0] and "Rex" not in prompts("last-10")[0]
    assert "Rex" in prompts("bm25-1")[0] and "Paris" in prompts("bm25-1")[1] and "Rex" not in prompts("bm25-1")[1]
    # what is told and what is in context are the whole document, once
    patched = made(DeltaMemConfig.tsw(output_init="random"))
    for policy, everything in (("last-10", False), ("everything", True)):
        run = prepared(policy, True, patched)
        told = "".join(TOKENIZER.decode(window.ids[0]) for window in run.told)
        assert ("Rex" in told) != everything and ("Rex" in run.context) == everything
        text = "\n\n".join(part for part in DOCUMENTS[0].parts if part.strip())
        assert run.context and text.endswith(run.context)
    whole = prepared("nothing", True, patched)
    assert "Rex" in "".join(TOKENIZER.decode(window.ids[0]) for window in whole.told) and not whole.context


@pytest.mark.parametrize("policy", ["everything", "last-10"])
def test_all_of_a_shared_context_is_written_and_no_question(patched, policy):
    run = Prepared(patched, TOKENIZER, TASK, DOCUMENTS[0], policy_named(policy), SETTINGS, True)
    assert TOKENIZER.decode(run.shared).rstrip("\n").endswith(run.context)
    for asked, text in zip(run.asked, QUESTIONS, strict=True):
        assert TOKENIZER.decode(asked.ids).lstrip("\n").startswith(text)
    memory = MemoryState.zeros(patched)
    list(run.batches(memory))
    if not run.segmented:
        plain = MemoryState.zeros(patched)
        patched(torch.tensor([run.shared]), memory=plain, use_cache=False)
        assert all(torch.allclose(memory[i], plain[i], atol=1e-5) for i in plain) and memory[0].norm() > 0


@pytest.mark.parametrize(
    "context, question", [("Ada took the train h", "er x"), ("Ada took the", "n x"), ("Ada lik", "s x")]
)
def test_questions_that_change_the_contexts_end_share_what_is_alike(context, question):
    """Whatever a question's first letters make of the tokens before it, its prompt is the whole one; skipped or not."""
    glued, model = replace(TASK, prompt="{context}{question}"), made()

    def run(*texts, skip=()):
        told = Document("d", (context,), tuple(Question(f"d-{i}", text, ("x",)) for i, text in enumerate(texts)))
        return Prepared(model, TOKENIZER, glued, told, policy_named("everything"), SETTINGS, False, skip)

    found, alone, rest = run("a", question, "1"), run("a", "1"), run("a", question, "1", skip=("d-1",))
    assert len(found.shared) < len(alone.shared)
    for each in (found, alone, rest):
        for asked in each.asked:
            assert [*each.shared, *asked.ids] == each._ids(context + asked.question.text)
    assert found.shared == rest.shared and len(rest.asked) == 2


def test_last_tokens_are_counted_over_parts():
    parts = ("Ada took the train home.", "My dog is called Rex.", "She went to the market.")
    text = "\n\n".join(parts)
    total = len(TOKENIZER(text, add_special_tokens=False)["input_ids"])
    for amount in range(1, total + 2):
        run = Prepared(
            made(DeltaMemConfig.tsw()),
            TOKENIZER,
            TASK,
            document("d", *parts),
            policy_named(f"last-{amount}"),
            SETTINGS,
            True,
        )
        assert text.endswith(run.context)
        assert (
            len(TOKENIZER(run.context, add_special_tokens=False)["input_ids"]) <= min(amount, total) + 3
        )  # cut through a word
        told = "".join(TOKENIZER.decode(window.ids[0], skip_special_tokens=True) for window in run.told)
        for word in ("train", "Rex", "market"):
            assert (word in told) != (word in run.context) or word[:2] in run.context + told  # cut through, or in one


def test_costs(patched):
    for policy in POLICIES:
        for answer in answered(patched, policy, documents=DOCUMENTS[:1]):
            read, told = policy != "nothing", policy in ("nothing", "bm25-1", "last-10")  # bm25: its index
            assert (answer.context_seconds > 0) == read and (answer.told_tokens > 0) == told
            assert (answer.tell_seconds > 0) == told and (answer.context_tokens > 0) == (policy != "nothing")
            assert answer.prefill_seconds > 0 and answer.decode_seconds >= 0 and 1 <= answer.answer_tokens <= 6
            assert answer.question_tokens > 0 and answer.peak_bytes > 10_000_000


def test_what_was_told_is_not_told_again(patched, monkeypatch):
    from deltamem_fast.eval import answering

    remembered, calls, remember = {}, [], answering.remember
    monkeypatch.setattr(
        answering, "remember", lambda model, told, **o: (calls.append(len(told)), remember(model, told, **o))[1]
    )
    first = texts(answered(patched, "nothing", remembered=remembered))
    told = sum(calls)
    assert told == 3 and set(remembered) == {"first", "second", "third"}
    assert texts(answered(patched, "nothing", remembered=remembered)) == first and sum(calls) == told
    with monkeypatch.context() as inside:
        inside.setattr(answering, "windows_of", None)  # not even cut into windows
        answered(patched, "bm25-1", remembered=remembered)
    assert sum(calls) == told
    answered(patched, "last-10", remembered=remembered)
    assert sum(calls) > told and texts(answered(patched, "nothing", remembered=remembered)) == first


def test_what_does_not_fit_is_said_and_yarn_reads_it():
    model = made(max_position_embeddings=64)
    with pytest.raises(DoesNotFit, match="policy everything: a prompt with its answer takes .* trained on 64.*yarn"):
        answered(model, "everything", memory=False)
    assert len(answered(model, "yarn", memory=False)) == 15
    assert len(answered(model, "last-10", memory=False)) == 15


def test_questions_that_are_left_have_the_positions_of_all():
    """YaRN's factor is that of the longest question, though it was answered before the run was killed."""
    model = made(max_position_embeddings=64)
    long = Question("long", "Who took the train? " * 12, ("x",))
    some = [replace(DOCUMENTS[0], questions=(long, *DOCUMENTS[0].questions))]
    whole, skip = texts(answered(model, "yarn", memory=False, documents=some)), {"long", "first-1"}
    left = texts(answered(model, "yarn", memory=False, documents=some, skip=skip))
    assert left == {id: text for id, text in whole.items() if id not in skip}
    prepared = [
        Prepared(model, TOKENIZER, TASK, some[0], policy_named("yarn"), SETTINGS, False, ids) for ids in ((), skip)
    ]
    assert prepared[0].longest == prepared[1].longest > 64 and len(prepared[1].asked) == 4
    assert prepared[0].longest // 64 > sum(map(len, (prepared[0].shared, prepared[0].asked[-1].ids))) // 64


def test_one_batch_s_cache_is_gone_before_the_next_is_copied(monkeypatch):
    from deltamem_fast.eval import answering

    model, caches = made(), []

    def watched(cache, rows):
        assert not any(one() for one in caches)
        made = copied(cache, rows)
        caches.append(weakref.ref(made))
        return made

    monkeypatch.setattr(answering, "copied", watched)
    assert len(answered(model, "everything", memory=False, documents=DOCUMENTS[:1])) == 5
    assert len(caches) == 3


def test_a_questions_own_length():
    longer = replace(DOCUMENTS[0].questions[0], more={"new_tokens": 11})
    some = [replace(DOCUMENTS[0], questions=(longer, *DOCUMENTS[0].questions[1:3]))]
    model = made()
    found = answered(model, "nothing", memory=False, documents=some)
    assert found[0].answer_tokens == 11 and [one.answer_tokens for one in found[1:]] == [6, 6]
    cut = answered(model, "nothing", memory=False, documents=some, settings=replace(SETTINGS, new_tokens=2))
    assert [one.answer_tokens for one in cut] == [2, 2, 2]


def test_an_unknown_token_is_told_before_anything_runs(patched):
    with pytest.raises(DeltaMemError, match="tokenizer: gives token id"):
        answered(tiny_model(vocab_size=20), "nothing", memory=False)


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen3", "mistral"])
def test_copies_of_a_cache_go_their_own_ways(family):
    from transformers import DynamicCache

    model = tiny_model(family)
    first, second = torch.arange(3, 33)[None], torch.arange(40, 52)[None]
    cache = DynamicCache(config=model.config)
    model(first, past_key_values=cache)
    want = model(torch.cat([first, second], 1)).logits[:, 30:]
    for _ in range(2):
        found = model(second, past_key_values=copied(cache)).logits
        torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-4)
    assert cache.get_seq_length() == 30


@torch.no_grad()
def test_yarn_is_over_after_verify():
    """Two ways of feeding, each with its positions: the model has its own again afterwards."""
    model = made(max_position_embeddings=64)
    rotary = model.model.rotary_emb
    found = verify(model, TOKENIZER, TASK, DOCUMENTS, policy_named("yarn"), memory=False, settings=SETTINGS)
    assert found.holds and model.model.rotary_emb is rotary


def test_verify_does_not_take_nan_for_equal(patched, monkeypatch):
    from deltamem_fast.eval import checking

    broken = lambda prepared, memory: (torch.full((512,), float("nan")) for _ in prepared.asked)  # noqa: E731
    monkeypatch.setattr(checking, "first_logits", broken)
    found = verify(patched, TOKENIZER, TASK, DOCUMENTS[:1], policy_named("nothing"), memory=True, settings=SETTINGS)
    assert not found.holds


@torch.no_grad()
def test_a_copied_cache_of_other_layers_is_a_deep_copy():
    """Layers that change their states in place: what a copy is fed is not seen by the next."""
    from transformers import DynamicCache, Lfm2Config, Lfm2ForCausalLM

    torch.manual_seed(0)
    config = Lfm2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, full_attn_idxs=[1], block_auto_adjust_ff_dim=False,
    )  # fmt: skip
    model = Lfm2ForCausalLM(config).eval()
    first, second = torch.arange(3, 23)[None], torch.arange(40, 48)[None]
    cache = DynamicCache(config=model.config)
    model(first, past_key_values=cache)
    found = [model(second, past_key_values=copied(cache)).logits for _ in range(2)]
    assert torch.equal(*found)


def test_a_hybrid_models_questions_do_not_meet():
    """LFM2's convolutions keep a state that changes in place: its questions are fed one by one."""
    from transformers import Lfm2Config, Lfm2ForCausalLM

    torch.manual_seed(0)
    config = Lfm2Config(
        vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, full_attn_idxs=[1], block_auto_adjust_ff_dim=False, pad_token_id=0,
        eos_token_id=TOKENIZER.eos_token_id,
    )  # fmt: skip
    model = Lfm2ForCausalLM(config).eval()
    found = verify(model, TOKENIZER, TASK, DOCUMENTS[:1], policy_named("everything"), memory=False, settings=SETTINGS)
    assert found.holds and found.questions == 5


def test_thoughts_are_no_answer():
    from tokenizers_for_tests import thinking_tokenizer

    tokenizer = thinking_tokenizer()
    run = Prepared(made(), tokenizer, TASK, DOCUMENTS[0], policy_named("nothing"), SETTINGS, False)
    said = tokenizer("<think>The user asks.</think>Rex", add_special_tokens=False)["input_ids"]
    assert run._answer(run.asked[0], said) == "Rex"
