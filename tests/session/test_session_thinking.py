"""Thinking: shown apart, not part of the answer, and of the context and the memory as the template shows it later."""

import pytest
import torch
from session_support import says, state_bits, tiny_session
from tokenizers_for_tests import mode_tokenizer, thinking_tokenizer, tokenizer_with

from deltamem_fast.text.thinking import TextStream, stream_tokens

THOUGHT = "<think>\nAda went to the market; the train?\n</think>\n\nShe went home."

# A template that opens the thinking itself, as those of models that always think do.
OPENING_TEMPLATE = """\
{%- for m in messages -%}
{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n<think>\n' }}{%- endif -%}
"""


@pytest.mark.parametrize("strategy", ("tsw", "ssw", "msw"))
@pytest.mark.parametrize("tokenizer", (thinking_tokenizer, mode_tokenizer), ids=("qwen3", "smollm3"))
def test_thinking_is_shown_apart_and_leaves_no_trace(tokenizer, strategy):
    session = tiny_session(tokenizer(), strategy, context_turns=2)
    plain = tiny_session(tokenizer(), strategy, context_turns=2)
    for text in ("Where did Ada go?", "And then?", "Why?"):
        thought = []
        pieces = list(session.send(text, on_thinking=thought.append, **says(session.tokenizer, THOUGHT)))
        assert "".join(pieces) == "She went home."
        assert "".join(thought) == "Ada went to the market; the train?"
        plain.answer(text, **says(plain.tokenizer, "She went home."))
    last = session.messages[-1]
    assert last["content"] == "She went home." and last["reasoning_content"] == "Ada went to the market; the train?"
    # What the templates drop from earlier turns is neither in the context nor in the memory.
    assert session._now.ids == plain._now.ids
    assert "market" not in session.tokenizer.decode(session._now.ids)
    assert state_bits(session.memory) == state_bits(plain.memory)
    assert (
        session._now.ids
        == session._renderer.ids([*session.context, {"role": "user", "content": "x"}])[: len(session._now.ids)]
    )


@pytest.mark.parametrize("tokenizer", (thinking_tokenizer, mode_tokenizer), ids=("qwen3", "smollm3"))
def test_thinking_switched_off(tokenizer):
    session = tiny_session(tokenizer(), template={"enable_thinking": False})
    for text in ("Where did Ada go?", "And then?"):
        assert session.answer(text, **says(session.tokenizer, "She went home.")) == "She went home."
    assert "reasoning_content" not in session.messages[-1]
    wanted = session._renderer.ids([*session.context, {"role": "user", "content": "x"}])
    assert wanted[: session.context_tokens] == session._now.ids


def test_a_header_that_opens_the_thinking():
    session = tiny_session(tokenizer_with(OPENING_TEMPLATE))
    thought = []
    text = "The train, I think.\n</think>\n\nShe went home."
    found = "".join(session.send("Where?", on_thinking=thought.append, **says(session.tokenizer, text)))
    assert found == "She went home." and "".join(thought) == "The train, I think."


def test_thinking_that_does_not_end():
    session = tiny_session(thinking_tokenizer())
    options = says(session.tokenizer, "<think>\nHm, the train") | {"max_new_tokens": 8}
    assert session.answer("Where?", **options) == ""
    assert session.messages[-1]["reasoning_content"].startswith("Hm")
    assert session.answer("Where?", **says(session.tokenizer, "Home.")) == "Home."


@pytest.mark.parametrize(
    ("text", "answer", "thinking"),
    (
        ("She said <think> and </think> aloud.", "She said <think> and </think> aloud.", ""),
        ("  <think>a</think><think>b</think> c", "c", "ab"),
        ("<think>\n\n</think>\n\nYes. ", "Yes.", ""),
        ("a < b <thin", "a < b <thin", ""),
        ("", "", ""),
        ("<think>a <b> </thin </think>c", "c", "a <b> </thin"),
    ),
)
def test_text_streams(text, answer, thinking):
    tokenizer = thinking_tokenizer()
    stream, pieces = TextStream(tokenizer, "<|im_start|>assistant\n"), []
    for token in tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]:
        pieces += stream.add(token)
    pieces += stream.end()
    assert (stream.answer, stream.thinking) == (answer, thinking)
    assert "".join(piece for piece, thinks in pieces if not thinks) == answer
    assert "".join(piece for piece, thinks in pieces if thinks) == thinking


def test_the_stream_hands_on_what_generate_raises():
    session = tiny_session(thinking_tokenizer())
    with pytest.raises(ValueError, match="temperature"):
        list(stream_tokens(session.model, {"input_ids": torch.tensor([[3]]), "temperature": 0.0, "do_sample": True}))


@pytest.mark.parametrize("refuses", (False, True), ids=("", "refuses to begin with a tool's result"))
def test_a_turn_that_answers_a_tool(refuses):
    """The tool's result makes a turn of its own; the template needs what came before it."""
    tokenizer = thinking_tokenizer()
    if refuses:
        tokenizer.chat_template = (
            "{%- if messages[0].role == 'tool' -%}{{ raise_exception('no question') }}{%- endif -%}"
            + tokenizer.chat_template
        )
    session = tiny_session(tokenizer, context_turns=3)
    call = '<tool_call>\n{"name": "where", "arguments": {}}\n</tool_call>'
    assert session.answer("Where did Ada go?", **says(tokenizer, call)) == call
    result = [{"role": "tool", "content": "market"}]
    assert session.answer(result, **says(tokenizer, "To the market.")) == "To the market."
    wanted = session._renderer.ids([*session.context, {"role": "user", "content": "x"}])
    assert wanted[: session.context_tokens] == session._now.ids
    assert session.answer("And then?", **says(tokenizer, "Home.")) == "Home."
    assert [message["role"] for message in session.context] == [
        "user",
        "assistant",
        "tool",
        "assistant",
        "user",
        "assistant",
    ]
