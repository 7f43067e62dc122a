"""Segment ids of a chat: blocks of messages, sentences, and templates that render a message in more than one way."""

import itertools

import pytest
import tokenizers_for_tests as made
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltamem_fast.config import GRANULARITIES
from deltamem_fast.text.segments import segment_ids_from_messages, sentence_spans

CHATML_MODELS = (made.chatml_tokenizer, made.default_system_tokenizer, made.thinking_tokenizer, made.mode_tokenizer)
ALL = (*CHATML_MODELS, made.trimmed_tokenizer)
CALL = {"type": "function", "function": {"name": "look", "arguments": {"x": 1}}}


def message(role, content, **more):
    return {"role": role, "content": content, **more}


def user(content, **more):
    return message("user", content, **more)


def assistant(content, **more):
    return message("assistant", content, **more)


def system(content):
    return message("system", content)


def tool(content):
    return message("tool", content)


def pieces(tokenizer, messages, granularity="message", **kwargs):
    """[(segment id, text of its tokens)], runs of the same id together; checks what holds for every chat."""
    input_ids, segment_ids = segment_ids_from_messages(tokenizer, messages, granularity, **kwargs)
    expected = tokenizer.apply_chat_template(messages, return_dict=False, **kwargs)
    assert input_ids.tolist() == [expected]
    assert segment_ids.shape == input_ids.shape
    assert input_ids.dtype == segment_ids.dtype == torch.int64
    written = [number for number in segment_ids[0].tolist() if number >= 0]
    assert written == sorted(written)
    assert sorted(set(written)) == list(range(len(set(written))))
    pairs = zip(segment_ids[0].tolist(), input_ids[0].tolist())
    return [
        (number, tokenizer.decode([token for _, token in run], clean_up_tokenization_spaces=False))
        for number, run in itertools.groupby(pairs, key=lambda pair: pair[0])
    ]


def numbered(*texts):
    return list(enumerate(texts))


# Messages


@pytest.mark.parametrize("granularity", ["message", "message_mean"])
def test_blocks_hold_header_content_and_trailer(granularity):
    chat = [system("Be brief."), user("Hi. Who?"), assistant("Me."), user("Ok")]
    assert pieces(made.chatml_tokenizer(), chat, granularity) == [
        (-1, "<|im_start|>system\nBe brief.<|im_end|>\n"),
        (0, "<|im_start|>user\nHi. Who?<|im_end|>\n"),
        (1, "<|im_start|>assistant\nMe.<|im_end|>\n"),
        (2, "<|im_start|>user\nOk<|im_end|>\n"),
    ]


@pytest.mark.parametrize("granularity", ["sentence", "sentence_mean"])
def test_header_joins_first_sentence_and_trailer_the_last(granularity):
    chat = [user("One here. Two: QED"), assistant("Four!\n\nFive?  Six")]
    assert pieces(made.chatml_tokenizer(), chat, granularity) == numbered(
        "<|im_start|>user\nOne here. ",
        "Two: ",
        "QED<|im_end|>\n",
        "<|im_start|>assistant\nFour!\n\n",
        "Five?  ",
        "Six<|im_end|>\n",
    )


def test_configuration_names_are_accepted():
    for granularity in GRANULARITIES[1:]:
        segment_ids_from_messages(made.chatml_tokenizer(), [user("Hi")], granularity)


@pytest.mark.parametrize("make", ALL)
def test_generation_prompt_is_not_written(make):
    tokenizer, chat = make(), [user("Hi. Hi."), assistant("Hi."), user("Hi. Hi.")]
    for granularity in ("message", "sentence"):
        plain = pieces(tokenizer, chat, granularity)
        number, prompt = pieces(tokenizer, chat, granularity, add_generation_prompt=True)[-1]
        assert number == -1 and "assistant" in prompt
        assert pieces(tokenizer, chat, granularity, add_generation_prompt=True)[:-1] == plain


@pytest.mark.parametrize("make", ALL)
def test_identical_messages_are_told_apart(make):
    found = pieces(make(), [user("Hi"), user("Hi"), assistant("Hi"), user("Hi"), user("Hi")])
    found = [text for number, text in found if number >= 0]
    assert len(found) == 5 and found[0] == found[1] == found[3] == found[4]


@pytest.mark.parametrize(
    "make, role",
    [
        (made.chatml_tokenizer, "system"),
        (made.chatml_tokenizer, "developer"),
        (made.default_system_tokenizer, "developer"),
        (made.thinking_tokenizer, "system"),
    ],
)
def test_system_messages_between_others_are_not_written(make, role):
    found = pieces(make(), [user("A"), message(role, "B. C"), user("D")], "sentence")
    assert found[-3:] == [
        (0, "<|im_start|>user\nA<|im_end|>\n"),
        (-1, f"<|im_start|>{role}\nB. C<|im_end|>\n"),
        (1, "<|im_start|>user\nD<|im_end|>\n"),
    ]


def test_messages_that_the_template_drops_own_nothing():
    found = pieces(made.mode_tokenizer(), [user("A"), system("B"), user("C"), message("critic", "D"), user("E")])
    assert found[1:] == numbered(*(f"<|im_start|>user\n{name}<|im_end|>\n" for name in "ACE"))


@pytest.mark.parametrize("make", ALL)
def test_system_only(make):
    assert {number for number, _ in pieces(make(), [system("Be brief.")])} == {-1}


@pytest.mark.parametrize("content", ["", "  ", "\n\n"])
@pytest.mark.parametrize("make", ALL)
def test_empty_contents_are_one_segment(make, content):
    chat = [user(content), assistant(content), user("A. B"), assistant(content)]
    found = pieces(make(), chat, "sentence")
    assert [number for number, _ in found if number >= 0] == [0, 1, 2, 3, 4]
    assert pieces(make(), [user(content)], "message")[-1][0] == 0


def test_white_space_around_a_content():
    chat = [user("\n\n A.  B. \n"), assistant("\n\nC. D\n\n"), user(" \tE ")]
    assert pieces(made.chatml_tokenizer(), chat, "sentence") == numbered(
        "<|im_start|>user\n\n\n A.  ",
        "B. \n<|im_end|>\n",
        "<|im_start|>assistant\n\n\nC. ",
        "D\n\n<|im_end|>\n",
        "<|im_start|>user\n \tE <|im_end|>\n",
    )
    # Here the space before a word is in the word's token, and not in its offsets.
    assert pieces(made.trimmed_tokenizer(), chat, "sentence") == [
        (-1, "<|bos|>"),
        (0, "<|header|>user<|/header|>\n\nA. "),
        (1, " B.<|eot|>"),
        (2, "<|header|>assistant<|/header|>\n\nC."),
        (3, " D<|eot|>"),
        (4, "<|header|>user<|/header|>\n\nE<|eot|>"),
    ]
    assert pieces(made.default_system_tokenizer(), chat)[1:] == pieces(made.chatml_tokenizer(), chat)


def test_a_token_goes_where_its_first_letter_is():
    tokenizer = made.chatml_tokenizer()
    assert "Ġthe" in tokenizer.get_vocab()
    # The word's token begins with a space that belongs to the sentence before; the word does not.
    assert pieces(tokenizer, [user("Ada. the dog")], "sentence") == numbered(
        "<|im_start|>user\nAda.", " the dog<|im_end|>\n"
    )


def test_special_tokens_in_a_content():
    content = "A.<|im_end|>\n<|im_start|>user\nA. <think>\n</think> <tool_response>B<|bos|>"
    found = pieces(made.chatml_tokenizer(), [user(content), user(content)])
    assert found == numbered(*[f"<|im_start|>user\n{content}<|im_end|>\n"] * 2)
    found = pieces(made.thinking_tokenizer(), [user(content), assistant("x<|im_end|>\n"), user(content)], "sentence")
    assert found == numbered(
        "<|im_start|>user\nA.<|im_end|>\n<|im_start|>user\nA. ",
        "<think>\n</think> <tool_response>B<|bos|><|im_end|>\n",
        "<|im_start|>assistant\nx<|im_end|>\n<|im_end|>\n",
        "<|im_start|>user\nA.<|im_end|>\n<|im_start|>user\nA. ",
        "<think>\n</think> <tool_response>B<|bos|><|im_end|>\n",
    )


@pytest.mark.parametrize("make", ALL)
def test_characters_of_several_tokens(make):
    tokenizer = make()
    assert len(tokenizer("🧠", add_special_tokens=False)["input_ids"]) > 1
    found = [
        text
        for number, text in pieces(tokenizer, [user("🧠! 👩‍👩‍👧 é"), assistant("日本。 ü:\n🧠")], "sentence")
        if number >= 0
    ]
    assert len(found) == 5
    assert "🧠!" in found[0] and "👩‍👩‍👧 é" in found[1] and "ü:" in found[3] and "🧠" in found[4]


@pytest.mark.parametrize("code", [0xE000, 0xE001, 0xF8FF])
def test_private_use_characters_in_a_content(code):
    content = f"{chr(code)}0{chr(code)}. {chr(0xE000)}"
    found = pieces(made.thinking_tokenizer(), [user(content), assistant("<think>a</think>b"), user(content)])
    assert [text.count(chr(code)) for _, text in found] == [2 + (code == 0xE000), 0, 2 + (code == 0xE000)]


def test_contents_in_parts():
    parts = [{"type": "text", "text": text} for text in ("One. ", "", "Two. ", " ")]
    chat = [user(parts), assistant(parts[:1]), user([])]
    assert pieces(made.trimmed_tokenizer(), chat, "sentence") == [
        (-1, "<|bos|>"),
        (0, "<|header|>user<|/header|>\n\nOne."),
        (1, " Two.<|eot|>"),
        (2, "<|header|>assistant<|/header|>\n\nOne.<|eot|>"),
        (3, "<|header|>user<|/header|>\n\n<|eot|>"),
    ]
    # A template that drops such contents.
    assert pieces(made.mode_tokenizer(), chat, "sentence")[1:] == numbered(
        "<|im_start|>user\n<|im_end|>\n", "<|im_start|>assistant\n<|im_end|>\n", "<|im_start|>user\n<|im_end|>\n"
    )


def test_messages_are_left_as_they_are():
    chat = [user([{"type": "text", "text": "A. B"}]), assistant("C", tool_calls=[CALL])]
    copy = [
        user([{"type": "text", "text": "A. B"}]),
        assistant("C", tool_calls=[{**CALL, "function": {**CALL["function"]}}]),
    ]
    segment_ids_from_messages(made.trimmed_tokenizer(), chat, "sentence")
    assert chat == copy


# The system block


def test_default_system_block():
    block = (-1, "<|im_start|>system\nYou are a helpful assistant. Be kind!<|im_end|>\n")
    for first in ("user", "assistant"):
        chat = [message(first, " A. B"), user("C")]
        found = pieces(made.default_system_tokenizer(), chat, "sentence")
        assert found == [block, *pieces(made.chatml_tokenizer(), chat, "sentence")]


def test_metadata_block():
    tokenizer = made.mode_tokenizer()
    for chat in ([user("A. B"), assistant("C")], [system("Be brief. /think"), user("A. B"), assistant("C")]):
        found = pieces(tokenizer, chat, "sentence")
        assert found[0][0] == -1 and found[0][1].endswith("\n\n<|im_end|>\n")
        assert found[1:] == numbered("<|im_start|>user\nA. ", "B<|im_end|>\n", "<|im_start|>assistant\nC<|im_end|>\n")


@pytest.mark.parametrize("by_flag", [True, False])
def test_think_block_of_a_mode_joins_the_first_sentence(by_flag):
    chat = [user("A"), assistant("B. C"), user("D"), assistant("\nE")]
    kwargs = {"enable_thinking": False} if by_flag else {}
    chat = chat if by_flag else [system("Short. /no_think"), *chat]
    found = pieces(made.mode_tokenizer(), chat, "sentence", add_generation_prompt=True, **kwargs)
    assert found[1:] == [
        (0, "<|im_start|>user\nA<|im_end|>\n"),
        (1, "<|im_start|>assistant\n<think>\n\n</think>\nB. "),
        (2, "C<|im_end|>\n"),
        (3, "<|im_start|>user\nD<|im_end|>\n"),
        (4, "<|im_start|>assistant\n<think>\n\n</think>\nE<|im_end|>\n"),
        (-1, "<|im_start|>assistant\n<think>\n\n</think>\n"),
    ]


def test_bos_token_is_not_written():
    chats = ([user("A")], [system("S"), user("A")], [assistant("A")], [assistant("<think>a</think>\n\nA")])
    for chat in chats:
        found = pieces(made.trimmed_tokenizer(), chat)
        assert found[0][0] == -1 and found[0][1].startswith("<|bos|>")
        assert found[1] == (0, f"<|header|>{chat[-1]['role']}<|/header|>\n\n{chat[-1]['content']}<|eot|>")


# Rendered differently once other messages follow


def test_thinking_of_earlier_turns_is_dropped():
    thought = "<think>\nHm. So?\n\nYes.\n</think>\n\n"
    chat = [system("S"), user("A. B"), assistant(thought + "C. D"), user("A. B"), assistant(thought + "C. D")]
    assert pieces(made.thinking_tokenizer(), chat, "sentence") == [
        (-1, "<|im_start|>system\nS<|im_end|>\n"),
        *numbered(
            "<|im_start|>user\nA. ",
            "B<|im_end|>\n",
            "<|im_start|>assistant\nC. ",
            "D<|im_end|>\n",
            "<|im_start|>user\nA. ",
            "B<|im_end|>\n",
            f"<|im_start|>assistant\n{thought}C. ",
            "D<|im_end|>\n",
        ),
    ]


def test_thinking_kept_in_place_joins_the_first_sentence():
    thought = "<think>\nHm. So?\n</think>\n\n"
    found = pieces(made.chatml_tokenizer(), [user("A"), assistant(thought + "C. D")], "sentence")
    assert found[1:] == [(1, f"<|im_start|>assistant\n{thought}C. "), (2, "D<|im_end|>\n")]


@pytest.mark.parametrize("content", ["<think>\nHm. So?\n</think>\n\n", "<think>\nHm. So?\n</think>"])
def test_thinking_without_an_answer(content):
    chat = [user("A"), assistant(content), user("B"), assistant(content)]
    assert pieces(made.thinking_tokenizer(), chat, "sentence") == numbered(
        "<|im_start|>user\nA<|im_end|>\n",
        "<|im_start|>assistant\n<|im_end|>\n",
        "<|im_start|>user\nB<|im_end|>\n",
        "<|im_start|>assistant\n<think>\nHm. So?\n</think>\n\n<|im_end|>\n",
    )


def test_nothing_but_thinking_that_is_kept():
    found = pieces(made.trimmed_tokenizer(), [assistant("<think>a. b</think>\n"), user("A")], "sentence")
    assert found == [
        (-1, "<|bos|>"),
        (0, "<|header|>assistant<|/header|>\n\n<think>a. b</think><|eot|>"),
        (1, "<|header|>user<|/header|>\n\nA<|eot|>"),
    ]


def test_reasoning_content():
    chat = [
        user("A"),
        assistant("B. C", reasoning_content="Hm. So?"),
        user("D"),
        {"role": "assistant", "reasoning_content": "Look. Now.", "tool_calls": [CALL]},
        tool("E"),
        assistant("F. G", reasoning_content="\nAh. I see\n"),
    ]
    call = '<tool_call>\n{"name": "look", "arguments": {"x": 1}}\n</tool_call>'
    assert pieces(made.thinking_tokenizer(), chat, "sentence") == numbered(
        "<|im_start|>user\nA<|im_end|>\n",
        "<|im_start|>assistant\nB. ",
        "C<|im_end|>\n",
        "<|im_start|>user\nD<|im_end|>\n",
        f"<|im_start|>assistant\n<think>\nLook. Now.\n</think>\n\n{call}<|im_end|>\n",
        "<|im_start|>user\n<tool_response>\nE\n</tool_response><|im_end|>\n",
        "<|im_start|>assistant\n<think>\nAh. I see\n</think>\n\nF. ",
        "G<|im_end|>\n",
    )


@pytest.mark.parametrize("tools", [None, [{"type": "function", "function": {"name": "look"}}]])
@pytest.mark.parametrize("empty", ["", None])
def test_tool_calls_and_merged_responses(tools, empty):
    chat = [
        user("Go."),
        assistant(empty, tool_calls=[CALL, CALL]),
        tool("A. B"),
        tool("A. B"),
        tool(""),
        assistant("Sure. Now", tool_calls=[CALL]),
        tool("C"),
        assistant("Done."),
    ]
    call = '<tool_call>\n{"name": "look", "arguments": {"x": 1}}\n</tool_call>'
    found = pieces(made.thinking_tokenizer(), chat, "sentence", tools=tools)
    if tools:
        assert found[0][0] == -1 and found[0][1].startswith("<|im_start|>system\nTools:")
    assert found[bool(tools) :] == numbered(
        "<|im_start|>user\nGo.<|im_end|>\n",
        f"<|im_start|>assistant\n{call}\n{call}<|im_end|>\n",
        "<|im_start|>user\n<tool_response>\nA. ",
        "B\n</tool_response>",
        "\n<tool_response>\nA. ",
        "B\n</tool_response>",
        "\n<tool_response>\n\n</tool_response><|im_end|>\n",
        "<|im_start|>assistant\nSure. ",
        f"Now\n{call}<|im_end|>\n",
        "<|im_start|>user\n<tool_response>\nC\n</tool_response><|im_end|>\n",
        "<|im_start|>assistant\n<think>\n\n</think>\n\nDone.<|im_end|>\n",
    )


def test_a_content_whose_end_the_template_looks_at():
    response = "<tool_response>\nB. C\n</tool_response>"
    chat = [user("A"), assistant("<think>a</think>x"), user(response), assistant("<think>b</think>y"), user(response)]
    assert pieces(made.thinking_tokenizer(), chat, "sentence") == numbered(
        "<|im_start|>user\nA<|im_end|>\n",
        "<|im_start|>assistant\n<think>\na\n</think>\n\nx<|im_end|>\n",
        "<|im_start|>user\n<tool_response>\nB. ",
        "C\n</tool_response><|im_end|>\n",
        "<|im_start|>assistant\n<think>\nb\n</think>\n\ny<|im_end|>\n",
        "<|im_start|>user\n<tool_response>\nB. ",
        "C\n</tool_response><|im_end|>\n",
    )


@pytest.mark.parametrize("enable", [True, False])
def test_think_block_of_the_generation_prompt_is_not_written(enable):
    chat = [user("A"), assistant("<think>a</think>B"), user("C")]
    found = pieces(made.thinking_tokenizer(), chat, add_generation_prompt=True, enable_thinking=enable)
    block = "" if enable else "<think>\n\n</think>\n\n"
    assert found[1:] == [
        (1, "<|im_start|>assistant\nB<|im_end|>\n"),
        (2, "<|im_start|>user\nC<|im_end|>\n"),
        (-1, "<|im_start|>assistant\n" + block),
    ]


def test_system_message_inside_the_first_block():
    tokenizer = made.tokenizer_with(
        "{%- for m in messages -%}{%- if m.role != 'system' -%}{{ '<|header|>' }}"
        "{%- if loop.previtem is defined and loop.previtem.role == 'system' -%}{{ loop.previtem.content ~ '\\n\\n' }}"
        "{%- endif -%}{{ m.content ~ '<|eot|>' }}{%- endif -%}{%- endfor -%}"
    )
    assert pieces(tokenizer, [system("S. S"), user("S. A"), assistant("B")], "sentence") == [
        (-1, "<|header|>S. S"),
        *numbered("\n\nS. ", "A<|eot|>", "<|header|>B<|eot|>"),
    ]


def test_a_template_that_refuses_parts_of_the_chat():
    tokenizer = made.tokenizer_with(
        "{%- if messages[-1].role != 'user' -%}{{ raise_exception('ends with no question') }}{%- endif -%}"
        "{%- if messages[0].role == 'user' -%}{{ '<|bos|>Default.' }}{%- endif -%}" + made.CHATML_TEMPLATE
    )
    chat = [user("A. B"), assistant("C"), user("D")]
    # Nothing says where an answer's trailer ends, so it goes with what follows.
    assert pieces(tokenizer, chat)[-2:] == [
        (1, "<|im_start|>assistant\nC"),
        (2, "<|im_end|>\n<|im_start|>user\nD<|im_end|>\n"),
    ]


def test_tags_that_begin_alike():
    tokenizer = made.tokenizer_with(
        "{%- for m in messages -%}{{ '<m>' ~ m.content }}{{ '<end>' if loop.last else '<and>' }}{%- endfor -%}"
    )
    assert pieces(tokenizer, [user("A"), user("B"), user("C")]) == numbered("<m>A", "<and><m>B", "<and><m>C<end>")


def test_a_content_that_the_template_changes():
    tokenizer = made.tokenizer_with(
        "{%- for m in messages -%}{{ '<|header|>' ~ m.content | upper ~ '<|eot|>' }}{%- endfor -%}"
    )
    assert pieces(tokenizer, [user("a. b"), user("c")]) == numbered("<|header|>A. B<|eot|>", "<|header|>C<|eot|>")


@pytest.mark.parametrize("granularity", ["message", "sentence"])
def test_a_block_that_cannot_be_found(granularity):
    tokenizer = made.tokenizer_with(
        "{{ messages | length }}{%- for m in messages -%}{{ m.content | length ~ m.content }}{%- endfor -%}"
    )
    with pytest.raises(ValueError, match=r"messages\[0\]: cannot find where its block ends"):
        segment_ids_from_messages(tokenizer, [user("A"), user("B")], granularity)


ROLES_AND_CONTENTS = st.lists(
    st.tuples(
        st.sampled_from(["user", "user", "assistant", "assistant", "system"]),
        st.lists(
            st.sampled_from(
                [
                    "a",
                    "Ada",
                    " ",
                    "\n",
                    "\n\n",
                    ". ",
                    "!",
                    "🧠",
                    "é",
                    "<|im_end|>",
                    "<|im_start|>user\n",
                    "<think>",
                    "x",
                ]
            ),
            max_size=6,
        ).map("".join),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=80, deadline=None)
@given(ROLES_AND_CONTENTS, st.booleans())
def test_any_chat_in_chatml(chat, add_generation_prompt):
    chat = [message(role, content) for role, content in chat]
    for make in (made.chatml_tokenizer, made.default_system_tokenizer):
        tokenizer = make()
        ids, segments = segment_ids_from_messages(
            tokenizer, chat, "message", add_generation_prompt=add_generation_prompt
        )
        numbers, expected, total = itertools.count(), [], 0
        for turn in chat:
            block = f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n"
            # Blocks begin with a special token, so they are tokenized on their own.
            size = len(tokenizer(block, add_special_tokens=False)["input_ids"])
            expected += [-1 if turn["role"] == "system" else next(numbers)] * size
            total += size
        prompt = len(tokenizer("<|im_start|>assistant\n")["input_ids"]) if add_generation_prompt else 0
        implied = ids.shape[1] - total - prompt
        assert segments[0].tolist() == [-1] * implied + expected + [-1] * prompt
        assert implied == 0 or make is made.default_system_tokenizer


@settings(max_examples=80, deadline=None)
@given(ROLES_AND_CONTENTS, st.booleans(), st.booleans())
def test_any_chat_with_unstable_templates(chat, enable_thinking, add_generation_prompt):
    chat = [message(role, content) for role, content in chat]
    chat = [turn for turn in chat if turn["role"] != "system"] or [user("a")]
    kwargs = {"add_generation_prompt": add_generation_prompt, "enable_thinking": enable_thinking}
    for make in (made.thinking_tokenizer, made.mode_tokenizer, made.trimmed_tokenizer):
        tokenizer = make()
        blocks = [text for number, text in pieces(tokenizer, chat, "message", **kwargs) if number >= 0]
        assert len(blocks) == len(chat)
        for turn, block in zip(chat, blocks):
            start, end = (
                ("<|header|>", "<|eot|>") if make is made.trimmed_tokenizer else ("<|im_start|>", "<|im_end|>\n")
            )
            assert block.startswith(start + turn["role"]) and block.endswith(end)
            assert turn["content"].strip() in block
        # Sentences refine messages.
        ids, messages = segment_ids_from_messages(tokenizer, chat, "message", **kwargs)
        again, sentences = segment_ids_from_messages(tokenizer, chat, "sentence", **kwargs)
        assert torch.equal(ids, again)
        assert torch.equal(messages < 0, sentences < 0)
        changes = messages[0].diff() != 0
        assert (sentences[0].diff()[changes] != 0).all()


# Arguments


@pytest.mark.parametrize("granularity", ["token", "", None, 3, ["message"]])
def test_unknown_granularity(granularity):
    with pytest.raises(ValueError, match=r"granularity: got .*, allowed message, message_mean, sentence"):
        segment_ids_from_messages(None, [], granularity)


@pytest.mark.parametrize(
    "messages, text",
    [
        ([], "messages: got no message"),
        ("Hi", "messages: got str"),
        ({"role": "user", "content": "Hi"}, "messages: got dict"),
        ([user("A"), "B"], r"messages\[1\]: got str"),
        ([[user("A")]], r"messages\[0\]: got list"),
        ([user("A"), {"content": "B"}], r"messages\[1\]: got role None"),
        ([user("A"), {"role": "", "content": "B"}], r"messages\[1\]: got role ''"),
        ([user("A"), {"role": "user"}], r"messages\[1\]: has no content"),
        ([user(None)], r"messages\[0\]: has no content"),
        ([user(3)], r"messages\[0\]: got content of type int"),
        ([user([{"type": "image", "url": "x"}])], r"messages\[0\]: got a content part of type"),
        ([user(["A"])], r"messages\[0\]: got a content part of type"),
    ],
)
def test_messages_that_are_refused(messages, text):
    # Before anything is done with the tokenizer.
    with pytest.raises(ValueError, match=text):
        segment_ids_from_messages(None, messages, "message")


@pytest.mark.parametrize("name", ["continue_final_message", "return_tensors", "truncation", "return_dict"])
def test_arguments_that_change_the_result_are_refused(name):
    with pytest.raises(ValueError, match=f"template_kwargs: got {name}"):
        segment_ids_from_messages(made.chatml_tokenizer(), [user("A")], "message", **{name: True})


def test_slow_tokenizers_are_refused():
    class SlowTokenizer:
        is_fast = False

    with pytest.raises(ValueError, match="tokenizer: got SlowTokenizer, which is no fast tokenizer"):
        segment_ids_from_messages(SlowTokenizer(), [user("A")], "message")


# Sentences


@pytest.mark.parametrize(
    "sentences",
    [
        ["One."],
        ["One. ", "Two"],
        ["One?! ", "Two... ", "three; ", "four: ", "five"],
        ["He said: ", '"Go." ', "(Now!)\n", "[Ok.]’ ", "end"],
        ["no mark\n\n", "next\n \t\n\n  ", "last\nline"],
        ["a\r\n\r\n", "b"],
        ["3.14 and 12:30 and a.b"],
        ["\n\n First. ", "Second. \n\n "],
        ["Mr. ", "Smith"],
        [" \n\n "],
        [". ", ". ", "."],
        ["日本。 ", "then"],
        ["你好！", "“去吧。”", "价格：100，时间：12：30；", "好吗？！\n", "好……再见｡", "end"],
        ["वह गया।", "वह आया॥ ", "end"],
        ["هل هو؟ ", "نعم؛ ", "لا۔ ", "end"],
        [
            "Well… ",
            "no…then",
        ],
        ["ရန်ကုန်။", "ပြီ"],
        [],
    ],
)
def test_sentences(sentences):
    text = "".join(sentences)
    assert [text[start:end] for start, end in sentence_spans(text)] == sentences


@settings(max_examples=500, deadline=None)
@given(st.one_of(st.text(), st.text(alphabet=".!?;: \n\t\r\"')]a\u2029\u00a0")))
def test_sentences_tile_the_text(text):
    spans = sentence_spans(text)
    assert all(start < end for start, end in spans)
    assert [start for start, _ in spans] == [0, *(end for _, end in spans)][: len(spans)]
    assert (spans[-1][1] if spans else 0) == len(text)
    # Only the text's own white space at its beginning begins a sentence.
    assert not any(text[start].isspace() for start, _ in spans[1:])
