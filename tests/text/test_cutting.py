"""Long texts in pieces: the limit holds for every kind of text, and nothing is lost."""

import base64

import pytest
import tokenizers_for_tests as made
import torch
from support import loud_adapter, tiny_model

from deltamem_fast import DeltaMemConfig, MemoryState, ingest, patch_model
from deltamem_fast.adapter.wrappers import decoder_of
from deltamem_fast.text.cutting import pieces_of
from deltamem_fast.text.encode import encode_text

TEXTS = {
    "chinese": "艾达去了市场。她坐了火车，然后回家了！我的狗在哪里？" * 12,
    "chinese without marks": "艾达去了市场她坐了火车然后回家了" * 12,
    "hindi": "अदा बाज़ार गई। उसने ट्रेन ली और घर गई। " * 8,
    "hindi without marks": "अदा बाज़ार गई उसने ट्रेन ली और घर गई " * 8,
    "thai": "เอด้าไปตลาดแล้วกลับบ้าน" * 10,
    "code": "def where(name):\n    return places[name] if name in places else None\n\n" * 12,
    "log": "2026-11-27T03:04:11Z level=info user=ada place=market\n" * 15,
    "one line": "Ada went to the market and she took the train " * 20,
    "base64": base64.b64encode(bytes(range(256)) * 3).decode(),
    "emoji": "👩‍👩‍👧🧠🎉" * 30,
    "white space": "Ada." + "\n" * 300 + " " * 300 + "Home.",
    "sentences": "Ada went home. She took the train; then she slept. " * 15,
}


def cut(tokenizer, text, tokens, config=None):
    """(text, tokens) of the pieces."""

    def encode(part, name):
        return encode_text(tokenizer, part, config or DeltaMemConfig(), name)[0][0]

    def count(texts):
        return [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]

    return [(piece, len(found)) for piece, found in pieces_of(text, tokens, count, encode)]


def squeezed(text):
    return "".join(text.split())


@pytest.fixture(scope="module")
def chatml():
    return made.chatml_tokenizer()


@pytest.mark.parametrize("name", TEXTS)
def test_no_piece_is_longer_than_the_limit_and_nothing_is_lost(chatml, name):
    text = TEXTS[name]
    for tokens in (64, 24):
        found = cut(chatml, text, tokens)
        assert len(found) > 1 and all(0 < length <= tokens for _, length in found)
        assert squeezed("".join(piece for piece, _ in found)) == squeezed(text)
        assert sum(length for _, length in found) / len(found) > 0.4 * tokens or name == "white space"
    as_message = cut(chatml, [{"role": "user", "content": text}], 64)
    assert max(length for _, length in as_message) <= 64
    assert squeezed("".join(m["content"] for messages, _ in as_message for m in messages)) == squeezed(text)


def test_pieces_end_where_sentences_lines_and_words_end(chatml):
    found = [piece for piece, _ in cut(chatml, TEXTS["chinese"], 120)]
    assert all(piece[-1] in "。！？" for piece in found)
    assert all(piece[-1] in "।" for piece, _ in cut(chatml, TEXTS["hindi"], 120))
    lines = set(TEXTS["log"].split("\n"))
    assert all(line in lines for piece, _ in cut(chatml, TEXTS["log"], 90) for line in piece.split("\n"))
    words = set(TEXTS["one line"].split())
    assert all(word in words for piece, _ in cut(chatml, TEXTS["one line"], 40) for word in piece.split())


@pytest.mark.parametrize("granularity", ("message_mean", "sentence_mean"))
@pytest.mark.parametrize("make", (made.thinking_tokenizer, made.mode_tokenizer, made.trimmed_tokenizer))
def test_templates_that_put_much_around_a_message(make, granularity):
    found = cut(make(), TEXTS["chinese"][:120], 90, DeltaMemConfig.ssw(granularity))
    assert len(found) > 1 and max(length for _, length in found) <= 90


def test_without_a_template():
    tokenizer = made.chatml_tokenizer()
    tokenizer.chat_template = None
    found = cut(tokenizer, TEXTS["chinese without marks"], 10)
    assert (
        max(length for _, length in found) <= 10
        and "".join(piece for piece, _ in found) == TEXTS["chinese without marks"]
    )


def test_thinking_and_calls_go_through_once_and_answers_stay_with_their_question():
    tokenizer = made.thinking_tokenizer()
    call = {"function": {"name": "where", "arguments": {}}}
    messages = [
        {"role": "user", "content": "Where did Ada go?"},
        {"role": "assistant", "content": TEXTS["sentences"], "reasoning_content": "Hm.", "tool_calls": [call]},
        {"role": "user", "content": "And then? " * 3},
        {"role": "assistant", "content": "She went home."},
    ]
    found = [piece for piece, _ in cut(tokenizer, messages, 150)]
    sent = [message for piece in found for message in piece]
    assert [m["content"] for m in sent if m.get("reasoning_content")] == [sent[1]["content"]]
    called = [place for place, m in enumerate(sent) if m.get("tool_calls")]
    assert len(called) == 1 and sent[called[0] + 1]["role"] == "user"
    assert [m["role"] for m in found[-1]][-2:] == ["user", "assistant"]


@pytest.mark.parametrize(
    ("text", "tokens", "message"),
    (
        ("Ada went home.", 3, "tokens: got 3, allowed more: the chat template of text alone are"),
        ("🎉🎉", 7, "tokens: got 7, allowed more: the character"),
        ([{"role": "user", "content": "Hi."}] * 3, 3, r"tokens: got 3, .* of text\[0\] alone"),
    ),
)
def test_a_limit_that_nothing_fits(chatml, text, tokens, message):
    with pytest.raises(ValueError, match=message):
        cut(chatml, text, tokens)


# --- through ingest


def tiny(tokenizer, config=None):
    model = tiny_model(vocab_size=len(tokenizer), num_hidden_layers=1)
    return loud_adapter(patch_model(model, config or DeltaMemConfig(), backend="reference"))


@pytest.mark.parametrize(
    "text",
    (
        TEXTS["chinese without marks"],
        [{"role": "user", "content": [{"type": "text", "text": TEXTS["chinese"]}, {"type": "text", "text": "Rex."}]}],
    ),
    ids=("text", "parts"),
)
def test_ingest_keeps_to_its_limit(chatml, text):
    model, seen = tiny(chatml), []
    hook = decoder_of(model).layers[0].register_forward_hook(lambda m, a, out: seen.append(a[0].shape[1]))
    found = ingest(model, chatml, MemoryState.zeros(model), text, tokens=64)
    hook.remove()
    assert max(seen) <= 64 and len(seen) == found.pieces > 3 and sum(seen) == found == found.tokens


def test_content_parts_are_their_text(chatml):
    model = tiny(chatml)
    parts = [{"type": "text", "text": "My dog is Rex."}, {"type": "text", "text": "He is old."}]
    one, other = MemoryState.zeros(model), MemoryState.zeros(model)
    ingest(model, chatml, one, [{"role": "user", "content": parts}])
    ingest(model, chatml, other, "My dog is Rex.\nHe is old.")
    assert torch.equal(one[0], other[0])
    for wrong in ({"type": "image", "url": "http://x"}, "text", {"type": "text"}):
        with pytest.raises(ValueError, match=r"text\[0\]: got a content part of type"):
            ingest(model, chatml, one, [{"role": "user", "content": [parts[0], wrong]}])
    assert torch.equal(one[0], other[0])


def test_texts_that_no_model_takes(chatml):
    small = loud_adapter(patch_model(tiny_model(vocab_size=100, num_hidden_layers=1), backend="reference"))
    memory = MemoryState.zeros(small)
    with pytest.raises(ValueError, match="tokenizer: gives token id .*, the model knows 0 to 99"):
        ingest(small, chatml, memory, "Ada went home.")
    chatml = made.chatml_tokenizer()
    chatml.chat_template = "{{ raise_exception('only odd roles') }}"
    for config in (DeltaMemConfig(), DeltaMemConfig.ssw()):
        model = tiny(chatml, config)
        with pytest.raises(ValueError, match="chat template refuses it: only odd roles"):
            ingest(model, chatml, MemoryState.zeros(model), "Ada went home.")


def test_a_template_that_quotes_a_chat_is_quoted_in_part(chatml):
    chatml = made.chatml_tokenizer()
    chatml.chat_template = "{{ raise_exception('not this: ' + messages[0]['content']) }}"
    model = tiny(chatml, DeltaMemConfig())
    with pytest.raises(ValueError, match="chat template refuses it: not this: Ada went home") as error:
        ingest(model, chatml, MemoryState.zeros(model), "Ada went home. " * 50)
    assert len(str(error.value)) < 300
