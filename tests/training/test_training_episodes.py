"""Episodes: which tokens are written, read and learnt, over-long examples, batches, and the order of a run."""

import pytest
from tokenizers_for_tests import (
    chatml_tokenizer,
    default_system_tokenizer,
    mode_tokenizer,
    thinking_tokenizer,
    tokenizer_with,
    trimmed_tokenizer,
)
from training_support import chat

from deltamem_fast import DeltaMemConfig, segment_ids_from_messages
from deltamem_fast.training import EpisodeSchedule, Example, build_episode, collate
from deltamem_fast.training.lengths import check_lengths

TOKENIZERS = {
    "chatml": chatml_tokenizer,
    "default system": default_system_tokenizer,
    "thinking": thinking_tokenizer,
    "mode": mode_tokenizer,
    "trimmed": trimmed_tokenizer,
}
# What a model says to end its turn.
ENDS = {name: "<|eot|>" if name == "trimmed" else "<|im_end|>" for name in TOKENIZERS}
TSW, MSW = DeltaMemConfig(), DeltaMemConfig.msw()


def example(*contents, answer="Rex. He is a dog!", where="f:1", write=None):
    messages = tuple(chat(*contents))
    write = tuple(chat("My dog is called Rex.", "Nice: a dog.")) if write is None else write
    return Example(where, write, messages, {"role": "assistant", "content": answer})


# --- what is learnt


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("answer", ("Rex", " Rex. He is a dog!\n", "<dog>\n\nRex"))
def test_labels_are_the_answer_and_the_end_of_its_turn(name, answer):
    tokenizer = TOKENIZERS[name]()
    episode = build_episode(tokenizer, TSW, example("What is its name?", answer=answer))
    learnt = [token for token in episode.labels if token != -100]
    text = tokenizer.decode(learnt)
    assert text.endswith(ENDS[name])
    # Templates may trim the answer; what they leave is learnt, and nothing else.
    assert text.removesuffix(ENDS[name]).strip() == answer.strip()
    assert learnt == episode.read_ids[-len(learnt) :] and len(episode.labels) == len(episode.read_ids)
    assert episode.labels[: -len(learnt)] == [-100] * (len(episode.labels) - len(learnt))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_what_is_read_begins_as_generate_would_see_it(name):
    tokenizer = TOKENIZERS[name]()
    asked = example("What is its name?")
    episode = build_episode(tokenizer, TSW, asked)
    prompt = episode.read_ids[: episode.labels.count(-100)]
    ways = [
        tokenizer.apply_chat_template(list(asked.read), add_generation_prompt=True, return_dict=False, **thinking)
        for thinking in ({}, {"enable_thinking": False})
    ]
    assert prompt in ways


def test_thinking_is_learnt_where_the_answer_thinks():
    episode = build_episode(thinking_tokenizer(), TSW, example("Its name?", answer="<think>\nhm\n</think>\n\nRex"))
    learnt = [token for token in episode.labels if token != -100]
    assert thinking_tokenizer().decode(learnt).split() == ["<think>", "hm", "</think>", "Rex<|im_end|>"]


def test_no_learning_from_a_template_that_contradicts_itself():
    template = (
        "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|header|>{% endif %}"
    )
    with pytest.raises(ValueError, match="f:1: the chat template renders the answer other than its generation prompt"):
        build_episode(tokenizer_with(template), TSW, example("a"))


def test_what_a_template_refuses_is_named():
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="f:1: roles must alternate"):
        build_episode(tokenizer_with(template), TSW, example("a"))


# --- what is written


@pytest.mark.parametrize("config", (TSW, MSW), ids=("tsw", "msw"))
def test_the_write_context_is_rendered_by_itself(config):
    tokenizer = chatml_tokenizer()
    asked = example("What is its name?")
    episode = build_episode(tokenizer, config, asked)
    assert episode.segment_ids is None
    assert episode.write_ids == tokenizer.apply_chat_template(list(asked.write), return_dict=False)


@pytest.mark.parametrize("granularity", ("message_mean", "sentence_mean"))
def test_segments_of_the_write_context(granularity):
    tokenizer = thinking_tokenizer()
    asked = example("What is its name?")
    episode = build_episode(tokenizer, DeltaMemConfig.ssw(granularity), asked)
    ids, segments = segment_ids_from_messages(tokenizer, list(asked.write), granularity)
    assert episode.write_ids == ids[0].tolist() and episode.segment_ids == segments[0].tolist()
    assert max(episode.segment_ids) >= 1


@pytest.mark.parametrize("config", (TSW, DeltaMemConfig.ssw()), ids=("tsw", "ssw"))
def test_kinds(config):
    tokenizer = chatml_tokenizer()
    asked = example("Hello.", "Hello!", "What is its name?")
    both, alone, nothing = (
        build_episode(tokenizer, config, asked, kind) for kind in ("both", "state_only", "no_memory")
    )
    assert both.kind == "both" and "Hello." in tokenizer.decode(both.read_ids)
    assert alone.kind == "state_only" and "Hello." not in tokenizer.decode(alone.read_ids)
    assert tokenizer.decode(alone.write_ids).startswith(tokenizer.decode(both.write_ids))
    assert "Hello." in tokenizer.decode(alone.write_ids)
    assert nothing.kind == "no_memory" and nothing.write_ids == [] and nothing.read_ids == both.read_ids
    learnt = [[token for token in episode.labels if token != -100] for episode in (both, alone, nothing)]
    assert learnt[0] == learnt[1] == learnt[2]


# --- batches


def test_batches_are_padded_on_the_right_with_masks():
    tokenizer, config = chatml_tokenizer(), DeltaMemConfig.ssw()
    episodes = [
        build_episode(tokenizer, config, example("a")),
        build_episode(tokenizer, config, example("a b c d e", write=())),
        build_episode(tokenizer, config, example("a"), "no_memory"),
    ]
    batch = collate(episodes, pad_token_id=7)
    for i, episode in enumerate(episodes):
        for ids, mask, given in (
            (batch.write_ids, batch.write_mask, episode.write_ids),
            (batch.read_ids, batch.read_mask, episode.read_ids),
        ):
            assert ids[i][mask[i]].tolist() == given and (ids[i][~mask[i]] == 7).all()
            assert mask[i].tolist() == sorted(mask[i].tolist(), reverse=True)
        assert batch.labels[i][batch.read_mask[i]].tolist() == episode.labels
        assert (batch.labels[i][~batch.read_mask[i]] == -100).all()
        assert batch.segment_ids[i][batch.write_mask[i]].tolist() == episode.segment_ids
        assert (batch.segment_ids[i][~batch.write_mask[i]] == -1).all()
    assert batch.tokens == sum(len(e.write_ids) + len(e.read_ids) for e in episodes)


def test_a_batch_in_which_nobody_writes_has_one_masked_token():
    batch = collate([build_episode(chatml_tokenizer(), TSW, example("a", write=()))] * 2)
    assert batch.write_ids.shape == (2, 1) and not batch.write_mask.any() and batch.segment_ids is None


# --- over-long examples


def lengths(examples, **changes):
    tokenizer = chatml_tokenizer()
    limits = {"write_length": 60, "read_length": 60} | changes
    return check_lengths(examples, lambda e, kind: build_episode(tokenizer, TSW, e, kind), **limits)


LONG = " ".join(["dog"] * 80)


def test_over_long_examples_are_named_with_their_lengths():
    examples = [
        example("a"),
        example("a", write=tuple(chat(LONG)), where="f:2"),
        example(LONG, where="f:3"),
    ]
    tokens = [len(build_episode(chatml_tokenizer(), TSW, e).write_ids) for e in examples]
    with pytest.raises(ValueError) as error:
        lengths(examples)
    assert "2 of 3 examples are over-long" in str(error.value) and "--over-long skip" in str(error.value)
    assert f"f:2: the write part has {tokens[1]} tokens, --write-length 60" in str(error.value)
    assert "f:3: the read part has" in str(error.value) and "--read-length 60" in str(error.value)
    checked = lengths(examples, over_long="skip")
    assert [(o.where, o.part, o.limit) for o in checked.over_long] == [("f:2", "write", 60), ("f:3", "read", 60)]
    assert list(checked.examples) == examples[:1] and checked.write_tokens == tokens[0]
    assert "2 over-long ones left out" in str(checked)


def test_the_limit_itself_is_allowed():
    asked = example("a")
    episode = build_episode(chatml_tokenizer(), TSW, asked)
    exact = {"write_length": len(episode.write_ids), "read_length": len(episode.read_ids)}
    assert len(lengths([asked], **exact).examples) == 1
    for name in exact:
        with pytest.raises(ValueError, match="1 of 1 examples are over-long"):
            lengths([asked], **(exact | {name: exact[name] - 1}))


def test_an_example_has_to_fit_state_only_too():
    asked = example(LONG, "ok", "a")
    assert len(lengths([asked], read_length=500).examples) == 1
    with pytest.raises(ValueError, match="the write part has"):
        lengths([asked], read_length=500, kinds=("both", "state_only"))


def test_many_over_long_examples_are_counted():
    with pytest.raises(ValueError, match="15 of 15 examples are over-long: f:0: .* and 5 more; allowed"):
        lengths([example(LONG, where=f"f:{i}") for i in range(15)], over_long="skip")


# --- the order of a run


def places(schedule):
    return [schedule.example_at(n) for n in range(len(schedule))]


def test_every_example_comes_once_before_any_comes_again():
    schedule = EpisodeSchedule(range(5), None, 15, seed=3)
    order = places(schedule)
    assert [sorted(order[i : i + 5]) for i in (0, 5, 10)] == [[0, 1, 2, 3, 4]] * 3
    assert order[:5] != order[5:10]


def test_a_place_of_the_run_is_the_same_from_wherever_one_begins():
    make = lambda: EpisodeSchedule(range(7), None, 40, seed=1, state_only=0.3, no_memory=0.2)  # noqa: E731
    whole, later = make(), make()
    assert [later.example_at(n) for n in reversed(range(40))][::-1] == places(whole)
    assert [later.kind_at(n) for n in (33, 5)] == [whole.kind_at(33), whole.kind_at(5)]
    assert places(EpisodeSchedule(range(7), None, 40, seed=2)) != places(whole)


def test_kinds_come_as_often_as_asked():
    schedule = EpisodeSchedule(range(7), None, 4000, seed=1, state_only=0.3, no_memory=0.2)
    kinds = [schedule.kind_at(n) for n in range(4000)]
    assert abs(kinds.count("state_only") / 4000 - 0.3) < 0.03 and abs(kinds.count("no_memory") / 4000 - 0.2) < 0.03
    certain = EpisodeSchedule(range(7), None, 50, seed=1, state_only=1.0)
    assert {certain.kind_at(n) for n in range(50)} == {"state_only"}
    built = EpisodeSchedule("abc", lambda item, kind: (item, kind), 3, seed=0, no_memory=1.0)
    assert sorted(built[n] for n in range(3)) == [(item, "no_memory") for item in "abc"]


def test_content_parts_are_their_text_in_examples_made_by_hand():
    parts = [{"type": "text", "text": "Rex."}, {"type": "text", "text": "He is old."}]
    made = Example("f:1", (*chat(parts),), (*chat(parts),), {"role": "assistant", "content": parts})
    plain = Example("f:1", (*chat("Rex.\nHe is old."),), (*chat("Rex.\nHe is old."),), chat("", "Rex.\nHe is old.")[1])
    for config in (TSW, DeltaMemConfig.ssw()):
        assert build_episode(chatml_tokenizer(), config, made) == build_episode(chatml_tokenizer(), config, plain)
    with pytest.raises(ValueError, match=r"f:1: read\[0\]: got a content part of type 'image'"):
        build_episode(chatml_tokenizer(), TSW, Example("f:1", (), (*chat([{"type": "image"}]),), made.answer))
