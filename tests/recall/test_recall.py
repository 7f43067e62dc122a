"""The recall proof: its world, its tokenizer, chats as batches, what is measured, pictures, conversation."""

import itertools
import re
from random import Random
from types import SimpleNamespace

import pytest
import torch
from matplotlib.image import imread
from recall_weights import CONFIGS, untrained_backbone

from deltamem_fast import MemoryState, patch_model, segment_ids_from_messages, unpatch_model
from deltamem_fast.adapter.record import identity_of
from deltamem_fast.display import style_of
from deltamem_fast.inspection import pictures as heatmap
from deltamem_fast.inspection.pictures import Snapshot, draw_heat_map, heat_map_lines, png_size
from deltamem_fast.recall import hints as interactive
from deltamem_fast.recall import measure, task, world
from deltamem_fast.recall.chats import answer, ask, encode, next_logits, tell
from deltamem_fast.recall.hints import converse, known_words, unknown_words
from deltamem_fast.recall.measure import CONDITIONS, draw_episode, draw_revision, recall, revise
from deltamem_fast.recall.proof import chance, draw_plan, draw_story, tell_facts, tell_revision
from deltamem_fast.recall.tokenizer import build_tokenizer
from deltamem_fast.recall.weights import STRATEGIES, find_weights, load_backbone

NAMES = {kind: (world.people, world.objects)[i] for i, kind in enumerate(world.KINDS)}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def model(tokenizer):
    return patch_model(untrained_backbone(tokenizer), CONFIGS["tsw"], backend="reference")


def parts(names, joint):
    """First and second parts of names."""
    if joint:
        return [{name.split(joint)[i] for name in names} for i in (0, 1)]
    pairs = [(a, b) for a in world.ONSETS for b in world.ENDINGS if a + b in set(names)]
    return [{pair[i] for pair in pairs} for i in (0, 1)]


# --- world and tokenizer


@pytest.mark.parametrize(("kind", "joint"), [("code", ""), ("place", " ")])
def test_held_out_names_are_new_and_their_parts_are_not(kind, joint):
    trained, held_out = NAMES[kind](False), NAMES[kind](True)
    assert len(set(trained + held_out)) == len(trained) + len(held_out)
    assert 0.15 < len(held_out) / len(trained + held_out) < 0.25
    assert parts(trained, joint) == parts(held_out, joint)


def test_a_name_is_two_tokens_and_a_value_one(tokenizer):
    for kind in world.KINDS:
        names = [name for held_out in (False, True) for name in NAMES[kind](held_out)]
        assert {len(ids) for ids in tokenizer(names)["input_ids"]} == {2}
        values = tokenizer(list(world.VALUES[kind]))["input_ids"]
        assert all(len(ids) == 1 for ids in values) and len({ids[0] for ids in values}) == len(values)


def test_the_tokenizer_is_the_same_each_time_and_loses_nothing(tokenizer):
    assert build_tokenizer().get_vocab() == tokenizer.get_vocab()
    text = "Where is the old lamp? Tomás: 8×8 \U0001f600"
    assert tokenizer.decode(tokenizer(text)["input_ids"]).strip() == text


def test_no_held_out_name_is_in_a_training_text():
    random = Random(3)
    text = " ".join(m["content"] for _ in range(300) for m in task.conversation(random, 8))
    words = re.findall(r"\w+", text)
    assert not set(words) & set(world.people(True)) and set(words) & set(world.people(False))
    pairs = {" ".join(pair) for pair in itertools.pairwise(words)}
    assert not pairs & set(world.objects(True)) and pairs & set(world.objects(False))


def test_facts_have_keys_and_values_of_their_own():
    facts = task.draw_facts(Random(0), 24, held_out=True)
    assert len({fact.key for fact in facts}) == 24
    for kind in world.KINDS:
        values = [fact.value for fact in facts if fact.kind == kind]
        assert len(set(values)) == len(values) > 0 and set(values) <= set(world.VALUES[kind])
        assert all(fact.key in NAMES[kind](True) for fact in facts if fact.kind == kind)
    other = task.changed(Random(1), facts[0])
    assert other.key == facts[0].key and other.value != facts[0].value


# --- chats


@pytest.mark.parametrize("prompt", [False, True])
def test_encode_is_what_the_chat_template_says(tokenizer, prompt):
    chats = [task.conversation(Random(seed), 5) for seed in range(4)]
    chats += [[task.user("Balton: 34. The old lamp is in the hall.")], [task.user("Balton?"), task.assistant("34")]]
    batch = encode(tokenizer, chats, add_generation_prompt=prompt)
    for row, chat in enumerate(chats):
        ids, segments = segment_ids_from_messages(tokenizer, chat, "sentence", add_generation_prompt=prompt)
        length = ids.shape[1]
        assert batch.input_ids[row, :length].tolist() == ids[0].tolist()
        assert batch.segment_ids[row, :length].tolist() == segments[0].tolist()
        assert batch.attention_mask[row].tolist() == [1] * length + [0] * (batch.input_ids.shape[1] - length)
        assert (batch.segment_ids[row, length:] == -1).all()
        assert (batch.input_ids[row, length:] == tokenizer.pad_token_id).all()


def test_asking_reads_and_does_not_write(model, tokenizer):
    chats = [[task.user("The code of Balton is 34.")], [task.user("The old lamp is in the hall.")]]
    memory = tell(model, tokenizer, chats)
    before = memory.clone()
    asked = ask(model, tokenizer, [[task.user("Balton?")]] * 2, memory)
    assert len(asked) == 2 and not memory.frozen
    assert all(torch.equal(memory[i], before[i]) and memory[i].abs().amax((1, 2, 3)).min() > 0 for i in memory)
    tell(model, tokenizer, chats, memory)
    assert not any(torch.equal(memory[i], before[i]) for i in memory)


def test_generate_answers_what_the_logits_say(model, tokenizer):
    memory = tell(model, tokenizer, [[task.user("The code of Balton is 34.")]])
    before = memory.clone()
    chat = [task.user("What is the code of Balton?")]
    for given in (memory, None):
        first = tokenizer.decode(next_logits(model, tokenizer, [chat], given).argmax(-1)).strip()
        assert answer(model, tokenizer, chat, given, max_new_tokens=1) == first
    assert all(torch.equal(memory[i], before[i]) for i in memory)
    bare = untrained_backbone(tokenizer)
    assert torch.equal(next_logits(bare, tokenizer, [chat]), next_logits(model, tokenizer, [chat]))
    assert answer(bare, tokenizer, chat) == answer(model, tokenizer, chat)


# --- measuring


def answered_from_sight(model, tokenizer, chats, memory=None):
    """Answers like a backbone that reads perfectly: from the sentences before the question."""
    answers = []
    for *seen, question in chats:
        text = " ".join(message["content"] for message in seen)
        kind_key = re.match(r"(?:What is the code of|Where is the) (.+)\?", question["content"]).group(1)
        found = re.search(rf"{kind_key}\b\D*?(?:is in the |in the |is |the code |uses |: )(\w+)\.", text)
        answers.append(found.group(1) if found else "")
    return answers


def test_each_condition_shows_what_it_says(model, tokenizer, monkeypatch):
    monkeypatch.setattr(measure, "ask", answered_from_sight)
    episodes = [draw_episode(Random(i), 4) for i in range(12)]
    shares = {condition: recall(model, tokenizer, episodes, condition, rows=5) for condition in CONDITIONS}
    assert shares["context"] == 1 and shares["half_frozen"] == shares["half_memory"] == 0.5
    assert shares["memory"] == shares["empty"] == shares["frozen"] == 0


def test_the_memory_that_is_asked_is_the_one_that_was_told(model, tokenizer, monkeypatch):
    """What ``ask`` is given under each condition, and that each row is its own conversation's."""
    episodes = [draw_episode(Random(i), 3) for i in range(4)]
    given = {}

    def ask_and_note(model, tokenizer, chats, memory=None):
        given[condition] = memory
        return [""] * len(chats)

    monkeypatch.setattr(measure, "ask", ask_and_note)
    for condition in CONDITIONS:
        assert recall(model, tokenizer, episodes, condition) == 0
    assert given["frozen"] is given["context"] is given["half_frozen"] is None
    assert all(not state.any() for _, state in given["empty"].items())
    alone = tell(model, tokenizer, [[*episodes[2].told, *episodes[2].visible]])
    told = given["memory"].select([6, 7, 8])  # three questions a conversation
    for i in alone:
        torch.testing.assert_close(told[i], alone[i].repeat(3, 1, 1, 1))
    older = tell(model, tokenizer, [episodes[2].told])
    torch.testing.assert_close(given["half_memory"].select([6])[0], older[0])


def test_recall_refuses_what_it_cannot_measure(model, tokenizer):
    with pytest.raises(ValueError, match="condition: got 'x', allowed memory"):
        recall(model, tokenizer, [draw_episode(Random(0), 1)], "x")
    with pytest.raises(ValueError, match="episodes: got none"):
        recall(model, tokenizer, [], "memory")
    with pytest.raises(ValueError, match="revisions: got none"):
        revise(model, tokenizer, [draw_revision(Random(0), 1)])


def test_revisions_are_counted(model, tokenizer, monkeypatch):
    revisions = [draw_revision(Random(i), 3) for i in range(6)]
    assert all(r.fact.key == r.episode.facts[r.place].key for r in revisions)
    assert all(r.fact.value != r.episode.facts[r.place].value and r.fact.value in r.update for r in revisions)
    stubborn = [fact.value for r in revisions for fact in r.episode.facts]
    monkeypatch.setattr(measure, "ask", lambda *arguments: stubborn)
    assert revise(model, tokenizer, revisions) == {"revised": 0, "stale": 1, "kept": 1}
    renewed = [r.fact.value if i == r.place else "" for r in revisions for i in range(3)]
    monkeypatch.setattr(measure, "ask", lambda *arguments: renewed)
    assert revise(model, tokenizer, revisions) == {"revised": 1, "stale": 0, "kept": 0}


def test_the_plan_is_fixed_by_its_seed():
    plan = draw_plan(1, 12)
    assert plan == draw_plan(1, 12) and plan != draw_plan(2, 12)
    assert {count: len(episodes) for count, episodes in plan.episodes.items()} == {
        1: 12, 2: 6, 3: 4, 4: 3, 6: 2, 8: 2, 12: 1, 16: 1,
    }  # fmt: skip
    assert all(len(e.facts) == count for count, episodes in plan.episodes.items() for e in episodes)
    assert chance() == pytest.approx((1 / 50 + 1 / len(world.PLACES)) / 2)


# --- the state as a picture


def shots(ranks=(8, 8), heads=1, count=3):
    generator = torch.Generator().manual_seed(0)
    states = [{i: torch.randn(heads, r, r, generator=generator) for i, r in enumerate(ranks)} for _ in range(count - 1)]
    empty = {i: torch.zeros(heads, r, r) for i, r in enumerate(ranks)}
    return [Snapshot(name, state) for name, state in zip(("empty", "one", "two"), [empty, *states])]


def test_a_snapshot_does_not_change_with_the_memory(model, tokenizer):
    story = draw_story(0)
    memory, taken = tell_facts(model, tokenizer, story)
    taken.append(tell_revision(model, tokenizer, story, memory))
    assert [shot.name for shot in taken] == ["empty", "1 fact", "2 facts", "3 facts", "4 facts", "revised"]
    assert not taken[0].states[0].any() and torch.equal(taken[-1].states[1], memory[1][0])
    assert len({tuple(shot.states[0].flatten().tolist()) for shot in taken}) == 6
    assert story.revised.key == story.facts[0].key and story.revised.value != story.facts[0].value


def test_png_is_a_picture_of_that_size_which_changes_with_the_state(tmp_path):
    taken = shots(heads=2)
    whole = imread(draw_heat_map(taken, tmp_path / "a" / "all.png"))
    assert whole.shape[1::-1] == png_size(taken) == (100 + 120 * 3, 50 + 120 * 4)
    before, after = (imread(draw_heat_map([shot], tmp_path / f"{shot.name}.png")) for shot in taken[:2])
    assert before.shape == after.shape and (before != after).any()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "empty.png", "one.png"]


def test_no_matplotlib_no_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(heatmap, "installed", lambda package: False)
    with pytest.raises(ImportError, match="matplotlib is not installed"):
        draw_heat_map(shots(), tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="snapshots: got none"):
        draw_heat_map([], tmp_path / "a.png")


@pytest.mark.parametrize("style", heatmap.STYLES)
def test_the_state_in_characters(style):
    def shown(line):
        return re.sub(r"\x1b\[[\d;]*m", "", line)

    lines = heat_map_lines(shots(ranks=(8, 3)), style, width=60)
    assert all(len(shown(line)) <= 60 for line in lines)
    high = 4 if style == "colour" else 8
    titles = [i for i, line in enumerate(lines) if line.startswith("layer")]
    assert titles == [0, high + 3] and lines[1].split() == ["empty", "one", "two"]
    assert lines != heat_map_lines(shots(ranks=(8, 3))[::-1], style, width=60)
    narrow = heat_map_lines(shots(), style, width=8)
    assert [line for line in narrow if line in ("empty", "one", "two")] == ["empty", "one", "two"] * 2
    beside = heat_map_lines(shots()[1:2], style, width=60)
    assert len(beside) == high + 1 and beside[0].count("layer") == 2
    if style == "ascii":
        assert all(line.isascii() for line in lines)
    assert ("\x1b" in "".join(lines)) == (style == "colour")


def test_signs_and_sizes_of_cells():
    state = torch.tensor([[1.0, -1.0], [0.0, 0.5]])
    lines = heat_map_lines([Snapshot("now", {3: state[None]})], "ascii")
    assert lines == ["layer 3: 1", "##-#", " .**"]
    colour = heat_map_lines([Snapshot("now", {3: state[None]})], "colour")
    assert colour[1] == "\x1b[38;5;160;48;5;231m▀\x1b[38;5;27;48;5;210m▀\x1b[0m"
    with pytest.raises(ValueError, match="style: got 'x', allowed colour, unicode, ascii"):
        heat_map_lines([Snapshot("now", {3: state[None]})], "x")


def test_the_style_is_what_the_stream_can_show(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")

    def stream(encoding, terminal):
        return SimpleNamespace(encoding=encoding, isatty=lambda: terminal)

    assert style_of(stream("utf-8", True)) == "colour" and style_of(stream("utf-8", False)) == "unicode"
    assert {style_of(stream(encoding, True)) for encoding in ("ascii", "latin-1", "no such", None)} == {"ascii"}
    monkeypatch.setenv("NO_COLOR", "1")
    assert style_of(stream("utf-8", True)) == "unicode"


# --- conversation


def test_known_words_are_whole_words_of_the_world():
    assert {"Balton", "lamp", "34", "Where", "hall", ".", "?"} <= known_words()
    assert not {"Bal", "ton", "Alice", "9", "99", "sta"} & known_words()
    random = Random(0)
    texts = [m["content"] for held_out in (False, True) for _ in range(50)
             for m in task.conversation(random, 6, held_out=held_out)]  # fmt: skip
    assert [text for text in texts if unknown_words(text)] == []
    assert unknown_words("Alice has the code 99, and Alice is 99.") == ["Alice", "99", ",", "and"]


def talk(model, tokenizer, *lines):
    said = []
    converse(model, tokenizer, lines, said.append, random=Random(0))
    return said


def test_conversation(model, tokenizer, monkeypatch):
    told, asked = [], []
    monkeypatch.setattr(interactive, "tell", lambda m, t, chats, memory: told.append(chats))
    monkeypatch.setattr(
        interactive, "answer", lambda m, t, chat, memory: asked.append((chat, memory)) or f"answer {len(asked)}"
    )
    said = talk(
        model, tokenizer, "The code of Balton is 34\n", "", "What is the code of Balton?", "balton: 35.", "/memory",
        "/reset", "/what", "/help", "/quit", "Balton: 36.",
    )  # fmt: skip
    assert told == [[[task.user("The code of Balton is 34.")]]]
    assert [chat for chat, _ in asked] == [[task.user("What is the code of Balton?")]] * 2
    assert said[:2] == ["Told: The code of Balton is 34.", "answer 1   (with an empty memory: answer 2)"]
    assert said[2].startswith("Not in its small world: balton (did you mean Balton?).")
    assert said[3].startswith("layer 0: 1") and said[4] == "Forgotten." and "No command /what" in said[5]
    assert "Say:" in said[6] and len(said) == 7


def test_reset_forgets_and_memory_shows_it(model, tokenizer):
    empty, shown, forgotten = (text for text in talk(
        model, tokenizer, "/memory", "The code of Balton is 34.", "/memory", "/reset", "/memory"
    ) if text.startswith("layer"))  # fmt: skip
    assert shown != empty == forgotten


# --- weights


def test_missing_and_broken_weights_are_named(tmp_path, tokenizer):
    with pytest.raises(FileNotFoundError, match=r"weights: .*backbone/config\.json: no such file; `python -m examples"):
        find_weights(tmp_path)
    untrained_backbone(tokenizer).save_pretrained(tmp_path / "backbone")
    tokenizer.save_pretrained(tmp_path / "backbone")
    with pytest.raises(FileNotFoundError, match=r"weights: .*tsw-r8/delta_mem_config\.json"):
        find_weights(tmp_path)
    (tmp_path / "backbone" / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises((ValueError, OSError), match="backbone"):
        load_backbone(tmp_path / "backbone")


def test_the_shipped_weights_are_there_and_load():
    weights = find_weights()
    assert set(weights.adapters) == set(STRATEGIES)
    model, tokenizer = load_backbone(weights.backbone)
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()
    assert tokenizer.chat_template == build_tokenizer().chat_template
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    for name, directory in weights.adapters.items():
        patch_model(model, directory)
        heads = 4 if name == "msw" else 1
        assert {tuple(state.shape) for _, state in MemoryState.zeros(model).items()} == {(1, heads, 8, 8)}
        assert identity_of(model).config.segmented == (name == "ssw")
        unpatch_model(model)
