"""MemorySession: what stays in the context, what the memory gets, and turns that do not come to an end."""

import threading
from dataclasses import replace

import pytest
import torch
from session_support import CONFIGS, everything, recall_model, says, state_bits, tiny_session
from support import relative_error, tiny_model
from tokenizers_for_tests import chatml_tokenizer, default_system_tokenizer, trimmed_tokenizer
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import DynamicCache

from deltamem_fast import MemorySession, MemoryState, memory_disabled
from deltamem_fast.adapter.wrappers import decoder_of

STRATEGIES = tuple(CONFIGS)
TALK = ("My dog is called Rex. He is old.", "Where did Ada go?", "She took the train; then she went home.", "And then?")


def answers(session, texts=TALK, **options):
    options = {"max_new_tokens": 6} | options
    return [session.answer(text, **options) for text in texts]


def test_a_session_goes_on_after_a_training_step():
    """Its keys and values are computed anew: under the weights of now, as in a session without a cache."""
    session = tiny_session(chatml_tokenizer())
    answers(session, TALK[:2])
    snapshot = session.snapshot()
    with torch.no_grad():
        for name, weight in session.model.named_parameters():
            if ".delta_memory.delta_" in name:
                weight.mul_(1.5)
    found = answers(session, TALK[2:])
    session.restore(snapshot)
    assert answers(session, TALK[2:]) == found
    session.restore(snapshot)
    session._now = replace(session._now, cache=None, mark=None)
    assert answers(session, TALK[2:]) == found


# --- what it does, against the model used by hand


def oracle(session, texts, replies, keep):
    """The same conversation with plain forwards of the model: a list of memories, one after each turn.

    Each block is one forward; a window is built anew from the memories before its turns.
    """
    model, renderer = session.model, session._renderer
    decoder = decoder_of(model)
    memory, states, turns = MemoryState.zeros(model), [], []

    def run(block, cache, memory):
        extra = {} if block.segments is None else {"segment_ids": torch.tensor([block.segments])}
        with torch.no_grad():
            decoder(torch.tensor([block.ids]), past_key_values=cache, memory=memory, **extra)

    for text, reply in zip(texts, replies):
        said, answer = {"role": "user", "content": text}, {"role": "assistant", "content": reply}
        chat = renderer.chat([said, answer, {"role": "user", "content": "x"}])
        kept = turns[max(0, len(turns) + 1 - keep) :] if keep else turns
        cache, before = DynamicCache(), memory.clone()
        first = kept[0][2] if kept else memory
        reads = first.clone() if kept else memory
        reads.frozen = len(kept) < len(turns)
        if chat.preamble.ids:
            run(chat.preamble, cache, reads)
        reads.frozen = False
        for number, (prompt, answered, start) in enumerate(kept):
            scratch = reads if number == 0 else start.clone()
            run(prompt, cache, scratch)
            run(answered, cache, scratch)
        run(chat.messages[0], cache, memory)
        run(chat.messages[1], cache, memory)
        turns.append((chat.messages[0], chat.messages[1], before))
        states.append(memory.clone())
    return states


@pytest.mark.parametrize("tokenizer", (chatml_tokenizer, default_system_tokenizer), ids=("chatml", "default system"))
@pytest.mark.parametrize("keep", (None, 1, 2))
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_memory_is_what_plain_forwards_of_the_blocks_write(strategy, keep, tokenizer):
    session = tiny_session(tokenizer(), strategy, context_turns=keep)
    found, replies = [], []
    for text in TALK:
        replies.append(session.answer(text, **says(session.tokenizer, "She went home.")))
        found.append(session.memory)
    for ours, theirs in zip(found, oracle(session, TALK, replies, keep)):
        for layer in ours:
            assert relative_error(ours[layer], theirs[layer]) < 1e-5


@pytest.mark.parametrize("strategy", ("tsw", "msw"))
def test_without_limits_it_is_the_patched_model_that_reads_the_whole_chat(strategy):
    session = tiny_session(default_system_tokenizer(), strategy)
    answers(session)
    memory, cache = MemoryState.zeros(session.model), DynamicCache()
    with torch.no_grad():
        session.model(torch.tensor([session._now.ids]), memory=memory, past_key_values=cache)
    for layer in memory:
        assert relative_error(session.memory[layer], memory[layer]) < 1e-5
    for ours, theirs in zip(session._now.window().layers, cache.layers):
        assert relative_error(ours.keys, theirs.keys) < 1e-4


def test_an_answer_is_what_generate_answers():
    session = tiny_session(chatml_tokenizer(), "tsw")
    for text in TALK[:3]:
        memory, tokenizer = session.memory.clone(), session.tokenizer
        chat = [*session.messages, {"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
        assert tuple(ids) == session._renderer.ids(chat)
        cache = DynamicCache()
        if session.messages:
            with torch.no_grad():  # the turns before, under the memories before them
                from deltamem_fast.session.turns import build

                now = session._now
                cache = build(session.model, now.preamble, now.turns, memory, written=now.written)
        found = session.model.generate(
            torch.tensor([ids]), memory=memory, past_key_values=cache, max_new_tokens=8, do_sample=False
        )
        text_found = tokenizer.decode(found[0, len(ids) :], skip_special_tokens=True).strip()
        assert session.answer(text, max_new_tokens=8) == text_found


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_template_without_a_header_for_the_answer(strategy):
    tokenizer = chatml_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}<|header|>{{ m.content }}<|/header|>"
        "{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    )
    session = tiny_session(tokenizer, strategy, context_turns=2)
    assert session._renderer.chat([{"role": "user", "content": "Hi."}]).header.ids == ()
    found = [session.answer(text, **says(tokenizer, "She went home.")) for text in TALK]
    assert found == ["She went home."] * len(TALK)
    assert len(session.context) == 4


@pytest.mark.parametrize("family", ("smollm3", "llama", "mistral", "qwen2"))
def test_families(family):
    """Mistral's sliding window included: 12 tokens, less than a turn."""
    session = tiny_session(trimmed_tokenizer(), "tsw", family, context_turns=2)
    again = MemorySession(session.model, session.tokenizer, context_turns=2)
    found = answers(session)
    assert found == answers(again) and everything(session) == everything(again)
    before = everything(session)
    pieces = session.send("Where is the market?", max_new_tokens=6)
    next(pieces, None)
    pieces.close()
    assert everything(session) == before


# --- the context


def test_the_newest_turns_stay():
    model, tokenizer = recall_model("msw")
    session = MemorySession(model, tokenizer, context_turns=2)
    for number, code in enumerate((42, 17, 23, 55)):
        session.answer(f"The code of Lumzel is {code}.", max_new_tokens=4)
        assert len(session.context) == 2 * min(number + 1, 2)
        assert session.context == session.messages[-len(session.context) :]
        assert session._now.window().get_seq_length() == session.context_tokens
    assert session.turns == 4
    assert session._now.ids == session._renderer.ids(session.context, header=False)


class Unread(dict):
    """A message that nobody may look into."""

    def _read(self, *arguments):
        raise AssertionError("an old message was read")

    __getitem__ = __iter__ = __contains__ = __deepcopy__ = __eq__ = get = items = values = keys = _read


def test_a_turn_looks_at_no_message_that_has_left_the_context():
    """So that it takes as long behind 20,000 messages as behind two."""
    session = tiny_session(chatml_tokenizer(), "msw", context_turns=1)
    answers(session)
    old = tuple(Unread(message) for message in session._now.messages)
    session._now = replace(session._now, messages=old, turn_count=len(old) // 2)
    answers(session, ["Who is Ada?"])
    assert session.turns == len(old) // 2 + 1 == session.audit().newest(1).moves[0].turn + 1
    session.rollback(session.turns - 1)
    assert session.turns == len(old) // 2


def test_context_tokens_bounds_the_prompt():
    model, tokenizer = recall_model("msw")
    session = MemorySession(model, tokenizer, context_tokens=40)
    seen = []

    class Looks(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append(input_ids.shape[1])
            return scores

    for _ in range(6):
        session.answer("The code of Lumzel is 42.", max_new_tokens=1, logits_processor=LogitsProcessorList([Looks()]))
    # 11 tokens a prompt with its header, 13 a turn: three turns do not fit into 40 beside a prompt
    assert seen == [11, 24, 37, 37, 37, 37]
    long = " ".join(["The dog came all day."] * 12)
    session.answer(long, max_new_tokens=1)
    assert len(session.context) == 2 and session.context_tokens > 40  # the newest always stays


def test_what_has_left_the_context_is_answered_from_the_memory():
    model, tokenizer = recall_model("msw")
    session = MemorySession(model, tokenizer, context_turns=1)
    session.answer("The code of Corpus is 42.")
    session.answer("The glass clock is in the hall.")
    assert session.answer("What is the code of Corpus?") == "42"
    assert session.answer("Where is the glass clock?") == "hall"
    assert "42" not in str(session.context)
    bare = MemorySession(model, tokenizer, context_turns=1)
    bare.remembers = False
    bare.answer("The code of Corpus is 42.")
    assert bare.answer("What is the code of Corpus?") != "42"


def test_a_system_message_stays_in_sight_and_is_written_once():
    session = tiny_session(chatml_tokenizer(), "tsw", system="You are kind.", context_turns=1)
    answers(session)
    system = session.tokenizer("<|im_start|>system\nYou are kind.<|im_end|>\n")["input_ids"]
    assert session._now.preamble.ids == tuple(system)
    assert session._now.ids[: len(system)] == tuple(system)
    assert not session._now.written and len(session._now.turns) == 1


def test_limits_can_change_between_turns():
    session = tiny_session(chatml_tokenizer())
    answers(session)
    assert len(session.context) == 8
    session.limit_context(turns=1)
    session.answer("And now?", max_new_tokens=3)
    assert len(session.context) == 2
    with pytest.raises(ValueError, match="context_turns: got 0, allowed an integer, 1 or more, or None"):
        session.limit_context(turns=0)
    assert session.limits.turns == 1


def test_drop_context_keeps_the_memory():
    model, tokenizer = recall_model("msw")
    session = MemorySession(model, tokenizer)
    session.answer("The code of Corpus is 42.")
    state = state_bits(session.memory)
    session.drop_context()
    assert session.context == [] and session.context_tokens == 0 and state_bits(session.memory) == state
    assert session.answer("What is the code of Corpus?") == "42"
    assert len(session.messages) == 4


def test_a_turn_of_several_messages():
    session = tiny_session(chatml_tokenizer(), "tsw", context_turns=2)
    session.answer([{"role": "user", "content": "Look."}, {"role": "tool", "content": "market"}], max_new_tokens=3)
    assert [message["role"] for message in session.messages] == ["user", "tool", "assistant"]
    session.answer("And?", max_new_tokens=3)
    session.answer("So?", max_new_tokens=3)
    assert [message["role"] for message in session.context] == ["user", "assistant"] * 2


# --- options


def test_what_was_said_stays_as_it_was_said(tmp_path):
    """Whatever its lists are used for afterwards, the caller's own and those that the session gives away."""
    session = tiny_session(chatml_tokenizer())
    calls = [{"function": {"name": "add", "arguments": {"numbers": [1, 2]}}}]
    session.answer([{"role": "user", "content": None, "tool_calls": calls}], max_new_tokens=2)
    said = session.messages
    calls[0]["function"]["arguments"]["numbers"].append(3)
    session.messages[0]["tool_calls"].clear()
    session.context[0]["tool_calls"][0]["function"]["name"] = "sub"
    assert session.messages == said == session.context and said[0]["tool_calls"][0]["function"]["name"] == "add"
    assert said[0]["tool_calls"][0]["function"]["arguments"] == {"numbers": [1, 2]}
    loaded = MemorySession.load(session.save(tmp_path / "saved"), session.model, session.tokenizer)
    assert loaded.messages == said
    with pytest.raises(TypeError, match="text: holds something that cannot be copied"):
        session.answer([{"role": "user", "content": "Go on.", "lock": threading.Lock()}])
    assert session.messages == said


def test_options_pass_through():
    session = tiny_session(chatml_tokenizer(), generation={"max_new_tokens": 3, "do_sample": False})
    story = says(session.tokenizer, "She went home and then she went home.")["logits_processor"]
    assert session.answer("Hi there.", logits_processor=story)
    assert story[0].said == 3
    torch.manual_seed(3)
    one = session.answer("Hi there.", do_sample=True, temperature=5.0, max_new_tokens=12)
    session.restore(session.snapshot())
    torch.manual_seed(4)
    assert session.answer("Hi there.", do_sample=True, temperature=5.0, max_new_tokens=12) != one
    text = session.answer("Hi.", **says(session.tokenizer, "She went home. Then"), stop_strings=["home"])
    assert text == "She went home"


def test_generation_stops_at_the_tokenizers_end_of_turn():
    tokenizer = chatml_tokenizer()
    session = tiny_session(tokenizer)
    session.model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|eos|>")
    session.answer("Hi.", **says(tokenizer, "Kind."))
    assert session.messages[-1]["content"] == "Kind."


def test_pieces_join_to_the_answer():
    session = tiny_session(chatml_tokenizer())
    text = "Grüße 🎉, \n\n  she went home.  "
    pieces = list(session.send("Hi.", **says(session.tokenizer, text)))
    assert len(pieces) > 5 and "".join(pieces) == text.strip() == session.messages[-1]["content"]


# --- turns that do not come to an end


class Fails(LogitsProcessor):
    def __init__(self, after: int):
        self.left = after

    def __call__(self, input_ids, scores):
        self.left -= 1
        if self.left < 0:
            raise MemoryError("out of memory")
        return scores


@pytest.mark.parametrize("context_turns", (None, 2))
@pytest.mark.parametrize("strategy", ("tsw", "ssw"))
def test_a_failure_in_the_middle_leaves_all_as_it_was(strategy, context_turns):
    session = tiny_session(chatml_tokenizer(), strategy, context_turns=context_turns)
    other = MemorySession(session.model, session.tokenizer, context_turns=context_turns)
    for text in TALK:
        before = everything(session)
        with pytest.raises(MemoryError):
            session.answer("Fail!", logits_processor=LogitsProcessorList([Fails(2)]), max_new_tokens=9)
        assert everything(session) == before
        assert session.answer(text, max_new_tokens=5) == other.answer(text, max_new_tokens=5)
        assert everything(session) == everything(other)


def test_a_failure_in_any_forward_leaves_all_as_it_was(monkeypatch):
    """Every place where a turn can break: each forward of each layer in turn."""
    session = tiny_session(chatml_tokenizer(), context_turns=2)
    answers(session, TALK[:2])
    layer = decoder_of(session.model).layers[1].mlp
    forward, calls = layer.forward, []
    for broken in range(100):
        calls.clear()

        def breaks(x, broken=broken):
            calls.append(x)
            if len(calls) > broken:
                raise RuntimeError("broken")
            return forward(x)

        before = everything(session)
        layer.forward = breaks
        try:
            session.answer("And then?", max_new_tokens=3)
        except RuntimeError:
            layer.forward = forward
            assert everything(session) == before
        else:
            break
        finally:
            layer.forward = forward
    assert broken >= 5  # two turns built anew, a prompt, a header, tokens, an answer


def test_an_interrupt_in_the_middle_leaves_all_as_it_was():
    session = tiny_session(chatml_tokenizer())
    session.answer(TALK[0], max_new_tokens=4)
    before = everything(session)

    def interrupted():
        for _ in session.send("Fail!", **says(session.tokenizer, "She went home and then she went home.")):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert everything(session) == before
    assert threading.active_count() == 1 or not any("run" in t.name for t in threading.enumerate())


def test_closing_the_iterator_undoes_the_turn_and_stops_the_thread():
    session = tiny_session(chatml_tokenizer())
    before, threads = everything(session), threading.active_count()
    pieces = session.send("Hi.", **says(session.tokenizer, "She went home and then she went home."))
    next(pieces)
    assert threading.active_count() == threads + 1
    pieces.close()
    assert threading.active_count() == threads and everything(session) == before


def test_one_turn_at_a_time():
    session = tiny_session(chatml_tokenizer())
    pieces = session.send("Hi.", **says(session.tokenizer, "She went home."))
    next(pieces)
    for attempt in (
        lambda: session.answer("And?"),
        lambda: session.ingest("Some text."),
        lambda: session.snapshot(),
        lambda: session.save("nowhere"),
        lambda: session.drop_context(),
    ):
        with pytest.raises(RuntimeError, match="a turn is under way"):
            attempt()
    list(pieces)
    assert session.turns == 1


def test_an_iterator_that_nobody_starts_does_nothing():
    session = tiny_session(chatml_tokenizer())
    before = everything(session)
    session.send("Hi.")
    assert everything(session) == before
    session.answer("Hi.", max_new_tokens=2)


def test_snapshots_can_be_gone_back_to_again_and_again():
    session = tiny_session(chatml_tokenizer(), context_turns=3)
    answers(session, TALK[:2])
    early, early_all = session.snapshot(), everything(session)
    one = answers(session, ("She went to Paris.", "And then?"))
    late, late_all = session.snapshot(), everything(session)
    session.memory.zero_()
    session.restore(early)
    assert everything(session) == early_all
    answers(session, ("Other words.", "Quite other words."))
    session.restore(late)
    assert everything(session) == late_all
    session.restore(early)
    assert answers(session, ("She went to Paris.", "And then?")) == one and everything(session) == late_all
    with pytest.raises(TypeError, match="snapshot: got int"):
        session.restore(3)


# --- without the memory


def test_off_is_the_bare_backbone_and_writes_nothing():
    session = tiny_session(chatml_tokenizer(), context_turns=3)
    session.answer(TALK[0], max_new_tokens=5)
    state = state_bits(session.memory)
    session.remembers = False
    ids = session._renderer.ids([*session.context, {"role": "user", "content": TALK[1]}])
    with memory_disabled(session.model):
        bare = session.model.generate(torch.tensor([ids]), max_new_tokens=5, do_sample=False)
    found = session.answer(TALK[1], max_new_tokens=5)
    assert found == session.tokenizer.decode(bare[0, len(ids) :], skip_special_tokens=True).strip()
    assert state_bits(session.memory) == state
    session.remembers = True
    session.answer(TALK[2], max_new_tokens=5)
    assert state_bits(session.memory) != state and len(session.context) == 6


def test_off_holds_for_the_turn_alone_and_not_for_who_reads_it():
    from deltamem_fast.adapter.record import is_disabled

    session = tiny_session(chatml_tokenizer())
    session.remembers = False
    for _ in session.send("Hi.", **says(session.tokenizer, "She went home.")):
        assert not is_disabled(session.model)
    assert not is_disabled(session.model)


def test_a_frozen_memory_is_read_and_not_written():
    model, tokenizer = recall_model("msw")
    session = MemorySession(model, tokenizer, context_turns=1)
    session.answer("The code of Corpus is 42.")
    session.memory.frozen = True
    state = state_bits(session.memory)
    session.answer("The code of Lumzel is 17.")
    assert session.answer("What is the code of Corpus?") == "42"
    assert state_bits(session.memory) == state and session.memory.frozen


# --- errors


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    (
        ({"context_turns": 0}, ValueError, "context_turns: got 0, allowed an integer, 1 or more, or None"),
        ({"context_turns": True}, ValueError, "context_turns: got True"),
        ({"context_tokens": 1.5}, ValueError, "context_tokens: got 1.5"),
        ({"system": 3}, TypeError, "system: got int"),
        ({"memory": 3}, TypeError, "memory: got int"),
        ({"generation": {"memory": 1}}, ValueError, "generation: got memory, which the session itself decides"),
    ),
)
def test_wrong_settings(settings, error, text):
    with pytest.raises(error, match=text):
        tiny_session(chatml_tokenizer(), **settings)


def test_wrong_models_tokenizers_and_memories():
    tokenizer = chatml_tokenizer()
    with pytest.raises(ValueError, match="not patched"):
        MemorySession(tiny_model(), tokenizer)
    session = tiny_session(tokenizer)
    with pytest.raises(ValueError, match="memory: got 2 rows, allowed 1"):
        MemorySession(session.model, tokenizer, memory=MemoryState.zeros(session.model, 2))
    other = tiny_session(tokenizer, "msw").model
    with pytest.raises(ValueError, match="memory: made under adapter"):
        MemorySession(session.model, tokenizer, memory=MemoryState.zeros(other))
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="tokenizer: has no chat template"):
        MemorySession(session.model, tokenizer)


@pytest.mark.parametrize(
    ("text", "options", "error", "message"),
    (
        ("", {}, ValueError, "text: got nothing but white space"),
        (3, {}, TypeError, "text: got int"),
        ([], {}, ValueError, "text: got no message"),
        (
            [{"role": "assistant", "content": "x"}],
            {},
            ValueError,
            r"text\[0\]: got role 'assistant', allowed user, tool",
        ),
        ("Hi.", {"num_beams": 2}, ValueError, "options: got num_beams"),
        ("Hi.", {"past_key_values": None}, ValueError, "options: got past_key_values"),
        ("Hi.", {"temperature": -1.0, "do_sample": True}, ValueError, "temperature"),
        ("Hi.", {"no_such_option": 1}, ValueError, "no_such_option"),
    ),
)
def test_wrong_turns_change_nothing(text, options, error, message):
    session = tiny_session(chatml_tokenizer())
    session.answer("Hi.", max_new_tokens=2)
    before = everything(session)
    with pytest.raises(error, match=message):
        session.answer(text, **options)
    assert everything(session) == before
