"""Answers: how long, under whose settings, what is said of one cut off, and templates with habits of their own."""

import logging

import pytest
import torch
from session_support import CONFIGS, recall_model, says, state_bits, tiny_session
from support import Says, loud_adapter, tiny_model
from tokenizers_for_tests import chatml_tokenizer, thinking_tokenizer, tokenizer_with
from transformers import GenerationConfig, LogitsProcessorList

from deltamem_fast import MemorySession, MemoryState, WriteResult, ingest, patch_model, retrieve
from deltamem_fast.text.thinking import TextStream

THOUGHT = "<think>\n" + "Hm, the train. " * 12


@pytest.fixture
def told(caplog):
    caplog.set_level(logging.WARNING, "deltamem_fast")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "deltamem_fast"]


def tiny(tokenizer, **special):
    model = tiny_model(vocab_size=len(tokenizer), num_hidden_layers=1, **special)
    return loud_adapter(patch_model(model, CONFIGS["tsw"], backend="reference"))


# --- retrieve


def test_retrieve_goes_on_to_its_end():
    tokenizer = chatml_tokenizer()
    model, text = tiny(tokenizer), "She went home and then she took the train. " * 6
    found = retrieve(model, tokenizer, MemoryState.zeros(model), "Where?", **speaks(tokenizer, text))
    assert found == text.strip()


def speaks(tokenizer, text):
    return {"logits_processor": LogitsProcessorList([Says(tokenizer, text)])}


def test_retrieve_has_room_for_thinking(told):
    tokenizer = thinking_tokenizer()
    model, thought = tiny(tokenizer), THOUGHT * 3
    assert len(tokenizer(thought)["input_ids"]) > 20
    memory = MemoryState.zeros(model)
    found = retrieve(model, tokenizer, memory, "Where?", **speaks(tokenizer, thought + "</think>\n\nHome."))
    assert found == "Home." and told() == []
    for _ in range(2):  # each time: an answer is missing
        assert retrieve(model, tokenizer, memory, "Where?", max_new_tokens=9, **speaks(tokenizer, thought)) == ""
    assert len(told()) == 2 and all("retrieve: the answer was cut off before its thinking ended" in t for t in told())


def test_options_that_retrieve_decides_itself():
    tokenizer = chatml_tokenizer()
    model = tiny(tokenizer)
    with pytest.raises(ValueError, match="options: got num_beams, which retrieve itself decides"):
        retrieve(model, tokenizer, MemoryState.zeros(model), "Where?", num_beams=2)
    with pytest.raises(TypeError, match="generation_config: got dict, allowed a GenerationConfig"):
        retrieve(model, tokenizer, MemoryState.zeros(model), "Where?", generation_config={})


# --- sessions


def test_an_answer_that_was_cut_off_in_its_thinking_says_so(told):
    session = tiny_session(thinking_tokenizer())
    assert session.last_finish is None
    assert session.answer("Where?", **(says(session.tokenizer, THOUGHT) | {"max_new_tokens": 8})) == ""
    assert session.last_finish == "thinking"
    (text,) = told()
    assert "session: the answer was cut off before its thinking ended, after 8 tokens" in text
    before = session.snapshot()
    assert session.answer("Where?", **says(session.tokenizer, "Home.")) == "Home." and session.last_finish == "stop"
    assert session.answer("And?", **(says(session.tokenizer, "She went home.") | {"max_new_tokens": 2})) != ""
    assert session.last_finish == "length"
    session.restore(before)
    assert session.last_finish == "thinking" and len(told()) == 1


TRAPS = {
    "static cache": {"cache_implementation": "static"},
    "quantized cache": {"cache_implementation": "quantized"},
    "beams": {"num_beams": 3, "early_stopping": True, "length_penalty": 0.5},
    "several answers": {"num_return_sequences": 3, "do_sample": True},
    "a dict": {"return_dict_in_generate": True, "output_scores": True, "output_hidden_states": True},
    "no cache": {"use_cache": False},
    "chunks": {"prefill_chunk_size": 4},
    "lookup": {"prompt_lookup_num_tokens": 3},
    "early exit": {"assistant_early_exit": 1},
    "an assistant": {"is_assistant": True},
    "healing": {"token_healing": True},
    "stop strings": {"stop_strings": ["zzz"]},
    "20 tokens": {"max_length": 20},
}


@pytest.mark.parametrize("trap", TRAPS)
@pytest.mark.parametrize("given", (False, True), ids=("of the model", "handed over"))
def test_a_generation_config_does_not_break_a_turn(trap, given):
    session = trap_session()
    wanted = MemorySession(session.model, session.tokenizer)
    text = "She went home and then she took the train."
    wanted.answer("Where?", **says(session.tokenizer, text))
    plain = GenerationConfig.from_dict(session.model.generation_config.to_dict())
    options = {"generation_config": GenerationConfig(**TRAPS[trap])} if given else {}
    if given and trap == "20 tokens":
        options = {}
    try:
        if not given:
            for name, value in TRAPS[trap].items():
                setattr(session.model.generation_config, name, value)
        assert session.answer("Where?", **speaks(session.tokenizer, text), **options) == text
        assert session.last_finish == "stop" and state_bits(session.memory) == state_bits(wanted.memory)
        found = retrieve(
            session.model, session.tokenizer, session.memory, "Where?", **speaks(session.tokenizer, text), **options
        )
        assert found == text
    finally:
        session.model.generation_config = plain


_made = []


def trap_session():
    if not _made:
        _made.append(tiny_session(chatml_tokenizer()))
    return MemorySession(_made[0].model, _made[0].tokenizer)


def test_a_models_sampling_settings_count_and_options_go_over_them():
    session = trap_session()
    config = session.model.generation_config
    before = config.do_sample, config.max_new_tokens, config.temperature
    config.do_sample, config.max_new_tokens, config.temperature = True, 7, 9.0
    try:
        seen = set()
        for seed in range(3):
            torch.manual_seed(seed)
            seen.add(MemorySession(session.model, session.tokenizer).answer("Where?"))
        assert len(seen) == 3
        greedy = {MemorySession(session.model, session.tokenizer).answer("Where?", do_sample=False) for _ in range(2)}
        assert len(greedy) == 1
        other = GenerationConfig(do_sample=False, max_new_tokens=2)
        session.answer("Where?", generation_config=other)
        assert session.last_finish == "length"
    finally:
        config.do_sample, config.max_new_tokens, config.temperature = before


def test_content_parts_and_what_is_no_text():
    session = trap_session()
    parts = [{"type": "text", "text": "My dog is Rex."}, {"type": "text", "text": "He is old."}]
    session.answer([{"role": "user", "content": parts}], max_new_tokens=2)
    assert session.messages[0]["content"] == "My dog is Rex.\nHe is old."
    assert "type" not in session.tokenizer.decode(session._now.ids)
    with pytest.raises(ValueError, match=r"text\[0\]: got a content part of type 'image'"):
        session.send([{"role": "user", "content": [{"type": "image"}]}])


# --- system messages of templates that fold, move or refuse them

_TURNS = (
    "{%- for m in turns -%}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{ raise_exception('roles must alternate user/assistant') }}{%- endif -%}"
    "{%- if m.role == 'user' -%}{{ '[INST] ' ~ (system ~ '\n\n' if system and FOLD else '') ~ m.content ~ '[/INST]' }}"
    "{%- else -%}{{ ' ' ~ m.content ~ eos_token }}{%- endif -%}{%- endfor -%}"
)
_SPLIT = (
    "{%- set system = messages[0].content if messages[0].role == 'system' else '' -%}"
    "{%- set turns = messages[1:] if system else messages -%}{{ bos_token }}"
)
SYSTEM_TEMPLATES = {
    "first": _SPLIT + _TURNS.replace("FOLD", "loop.first"),
    "last": _SPLIT + _TURNS.replace("FOLD", "loop.last"),
    "refuses": "{%- if messages[0].role == 'system' -%}{{ raise_exception('System role not supported') }}{%- endif -%}"
    "{%- set turns, system = messages, '' -%}{{ bos_token }}" + _TURNS.replace("FOLD", "false"),
}


@pytest.mark.parametrize("strategy", ("tsw", "ssw"))
@pytest.mark.parametrize("kind", SYSTEM_TEMPLATES)
def test_a_system_message_stands_in_front_of_the_context(kind, strategy):
    session = tiny_session(tokenizer_with(SYSTEM_TEMPLATES[kind]), strategy, system="Be kind.", context_turns=2)
    for _ in range(3):
        assert session.answer("Where did Ada go?", **says(session.tokenizer, "She went home.")) == "She went home."
    shown = session.tokenizer.decode(session._now.ids)
    question, answer = "[INST] Where did Ada go?[/INST]", " She went home.<|im_end|>"
    assert shown == "<|bos|>" + question.replace("Where", "Be kind.\n\nWhere") + answer + question + answer
    assert session._now.preamble.ids and "Where" not in session.tokenizer.decode(session._now.preamble.ids)
    # it is in no segment, so that the memory is the same without it, but for what its sight changes
    assert session._now.turns[0].prompt[0].ids != session._now.turns[1].prompt[0].ids


def test_a_template_that_takes_no_chat_at_all():
    session = trap_session()
    tokenizer = tokenizer_with("{{ raise_exception('nothing is supported') }}")
    with pytest.raises(ValueError, match="system: the tokenizer's chat template refuses it: nothing is supported"):
        MemorySession(session.model, tokenizer, system="Be kind.")
    with pytest.raises(ValueError, match="chat template refuses it: nothing is supported"):
        MemorySession(session.model, tokenizer).answer("Hi.")


def test_segments_of_a_template_that_moves_the_system_message():
    from deltamem_fast import segment_ids_from_messages

    tokenizer = tokenizer_with(SYSTEM_TEMPLATES["last"])
    roles = ("system", "user", "assistant", "user")
    messages = [{"role": role, "content": text} for role, text in zip(roles, ("Be kind.", "A. B.", "C.", "D."))]
    ids, segments = segment_ids_from_messages(tokenizer, messages, "message")
    parts = {n: tokenizer.decode(ids[segments == n]) for n in range(3)}
    assert parts == {0: "[INST] A. B.[/INST]", 1: " C.<|im_end|>", 2: "\n\nD.[/INST]"}
    assert tokenizer.decode(ids[segments == -1]) == "<|bos|>[INST] Be kind."


# --- answers and texts that are nearly nothing

EMPTY_IS_LEFT_OUT = (
    "{% for m in messages %}{% if m.content %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("strategy", ("tsw", "ssw"))
def test_an_empty_answer_under_a_template_that_leaves_it_out(strategy):
    session = tiny_session(tokenizer_with(EMPTY_IS_LEFT_OUT), strategy, context_turns=2)
    for text in ("", "She went home.", "", ""):
        assert session.answer("Where?", **says(session.tokenizer, text)) == text
    assert session.turns == 4 and session._now.ids == session._renderer.ids(session.context, header=False)


@pytest.mark.parametrize("missing", ("pad_token", "eos_token", "bos_token"))
def test_tokenizers_without_a_special_token(missing):
    tokenizer, model = chatml_tokenizer(), trap_session().model
    setattr(tokenizer, missing, None)
    session = MemorySession(model, tokenizer)
    assert session.answer("Hi.", max_new_tokens=3) == trap_session().answer("Hi.", max_new_tokens=3)
    retrieve(model, tokenizer, session.memory, "Where?", max_new_tokens=3)


def test_texts_that_no_model_takes():
    model, tokenizer = trap_session().model, tokenizer_with(EMPTY_IS_LEFT_OUT)
    tokenizer.add_tokens(["ZZZZ"])
    memory = MemoryState.zeros(model)
    for run in (
        lambda text: ingest(model, tokenizer, memory, text),
        lambda text: retrieve(model, tokenizer, memory, text),
        lambda text: MemorySession(model, tokenizer, memory=memory).answer(text),
        lambda text: memory.forget(model, tokenizer, text),
    ):
        with pytest.raises(ValueError, match="tokenizer: gives token id 452, the model knows 0 to 451"):
            run("ZZZZ went home.")
        for message in (
            {"role": "user", "content": "a \ud800 b"}, {"role": "user", "content": "a", "reasoning_content": "\ud800"},
            {"role": "\ud800", "content": "a"}, {"role": "user", "content": "a", "\ud800": 1},
        ):  # fmt: skip
            with pytest.raises(ValueError, match=r"text.*: got half of a surrogate pair"):
                run([message])
        cyclic = {"role": "user", "content": "a", "tool_calls": []}
        cyclic["tool_calls"].append(cyclic)
        with pytest.raises(ValueError, match=r"text.*: nested too deeply"):
            run([cyclic])
    with pytest.raises(TypeError, match="tokenizer: got NoneType"):
        ingest(model, None, memory, "Hi.")
    assert all(state.abs().max() == 0 for _, state in memory.items())


# --- text streams


def test_a_tokenizer_that_is_not_fast_and_ids_beyond_the_vocabulary():
    fast = thinking_tokenizer()

    class Slow:
        is_fast = False

        def __getattr__(self, name):
            return getattr(fast, name)

    ids = fast("<think>\nHm 🎉.\n</think>\n\nGrüße 🎉", add_special_tokens=False)["input_ids"]
    for tokenizer in (fast, Slow()):
        stream = TextStream(tokenizer, "")
        for token in [*ids, 100_000, fast.eos_token_id]:
            list(stream.add(token))
        list(stream.end())
        assert (stream.answer, stream.thinking, stream.thinks) == ("Grüße 🎉", "Hm 🎉.", False)


# --- results of one kind


@pytest.mark.parametrize("strategy", ("tsw", "ssw"))
def test_results_are_of_one_kind(strategy):
    model, tokenizer = recall_model(strategy)
    session, memory = MemorySession(model, tokenizer), MemoryState.zeros(model)
    found = [
        ingest(model, tokenizer, memory, "The code of Corpus is 42."),
        memory.forget(model, tokenizer, "The code of Corpus is 42."),
        session.ingest("The code of Corpus is 42."),
        session.revise("Now the code of Corpus is 43."),
        session.forget("The code of Corpus is 43."),
    ]
    assert all(isinstance(result, WriteResult) for result in found)
    assert [result.tokens for result in found] == [int(result) for result in found] and min(found) > 5
    assert all(result.pieces == 1 and result.skipped == 0 for result in found)
    assert repr(found[0]) == f"WriteResult(tokens={int(found[0])}, pieces=1, skipped=0, moved=1.0)"
