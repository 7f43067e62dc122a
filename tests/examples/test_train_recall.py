"""examples/recall: the episodes, a short training of each part, and its command."""

import functools
import importlib
import json
import re
import shutil
from random import Random

import pytest
import torch

from deltamem_fast import DeltaMemConfig, MemoryState, patch_model, record_gates
from deltamem_fast.recall import forms, world
from deltamem_fast.recall.chats import encode
from deltamem_fast.recall.tokenizer import build_tokenizer
from deltamem_fast.recall.weights import SHIPPED, load_backbone
from deltamem_fast.text.segments import sentence_spans
from deltamem_fast.training import ExampleFiles, TrainingOptions, build_episode, read_log
from deltamem_fast.training.loss import write_memory

pytestmark = pytest.mark.xdist_group("train_recall")  # what is trained is trained once


def example(name):
    return importlib.import_module(f"examples.recall.{name}")


# --- episodes


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    return example("episodes").write_episodes(tmp_path_factory.mktemp("data") / "episodes.jsonl", 400, 3, 8)


def test_episodes_are_drawn_from_the_seed_alone(lines, tmp_path):
    write = example("episodes").write_episodes
    assert write(tmp_path / "again.jsonl", 400, 3, 8).read_bytes() == lines.read_bytes()
    assert write(tmp_path / "other.jsonl", 400, 4, 8).read_bytes() != lines.read_bytes()


def test_every_answer_was_told_or_is_in_sight(lines):
    told = seen = other = 0
    for example in ExampleFiles([lines]):
        *visible, question = (message["content"] for message in example.read)
        answer = example.answer["content"]
        if question in world.SMALL_TALK:
            other += 1
        elif any(answer in text.replace(".", " ").split() for text in visible):
            seen += 1
        else:
            assert any(answer in m["content"].replace(".", " ").split() for m in example.write), example
            told += 1
    assert told > 300 and seen > 10 and 5 <= other <= 40


def test_no_name_that_is_held_out(lines):
    text = lines.read_text(encoding="utf-8")

    def named(held_out):
        names = (*world.people(held_out), *world.objects(held_out))
        return [name for name in names if re.search(rf"\b{name}\b", text)]

    assert len(named(False)) > 300 and not named(True)


def test_the_answer_and_its_end_are_learnt(lines):
    tokenizer, config = build_tokenizer(), example("adapters").adapter_config("ssw", 8)
    for item in list(ExampleFiles([lines]))[:20]:
        episode = build_episode(tokenizer, config, item)
        labels = [label for label in episode.labels if label != -100]
        assert tokenizer.decode(labels).strip() == item.answer["content"] + "<|end|>"
        assert len(episode.segment_ids) == len(episode.write_ids) and max(episode.segment_ids) > 0


# --- the backbone


def small(seed=0, least_right=0.0):
    return example("backbone").BackboneOptions(12, 8, 8, 64, least_right=least_right, seed=seed, save_every=10)


def test_a_backbone_is_trained(tmp_path):
    backbone = example("backbone")
    figures = backbone.train_backbone(small(), tmp_path)
    assert not list(tmp_path.glob("checkpoint-*"))
    assert json.loads((tmp_path / "training.json").read_text()) == figures
    assert figures["options"]["seed"] == 0 and figures["parameters"] == 956_032
    model, tokenizer = load_backbone(tmp_path)
    untrained = backbone.build_backbone(tokenizer, 0)
    batch = backbone.Batches(tokenizer, small())[5]["input_ids"]
    with torch.no_grad():
        assert model(batch, labels=batch).loss < untrained(batch, labels=batch).loss - 0.3


def test_a_backbone_goes_on_where_it_was_stopped(tmp_path):
    backbone = example("backbone")
    for _ in range(2):  # the second begins at the end
        with pytest.raises(RuntimeError, match="of the answers are right at the end; try another --seed"):
            backbone.train_backbone(small(least_right=0.9), tmp_path)
        assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-20"]
    with pytest.raises(ValueError, match="holds a run with .*'seed': 0.*; remove it, or give the same options"):
        backbone.train_backbone(small(seed=1, least_right=0.9), tmp_path)
    first, again = (backbone.Batches(build_tokenizer(), small())[15]["input_ids"] for _ in range(2))
    assert torch.equal(first, again) and first.shape == (8, 64)


def test_lists_come_first_and_long_conversations_last():
    batches = example("backbone").Batches(build_tokenizer(), example("backbone").BackboneOptions())
    found = [
        (tuple(b["input_ids"].shape), round(b["other_weight"].item(), 3))
        for b in map(batches.__getitem__, (0, 599, 600, 2099))
    ]
    assert found == [((24, 96), 0.5)] * 2 + [((32, 256), 0.2), ((16, 512), 0.2)]
    assert len(batches) == 2100


# --- adapters


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Eighty small steps of one fact each, and eight of settling: folder, figures, and train(settling steps)."""
    output, adapters = tmp_path_factory.mktemp("trained"), example("adapters")
    data = example("episodes").write_episodes(output / "one.jsonl", 300, 0, most_facts=1)
    options = TrainingOptions(
        output / "tsw", batch_size=16, accumulate=1, lr=2e-2, state_only_probability=0.0, cpu=True, progress=False
    )

    def train(settling_steps):
        settling = example("settle").SettlingOptions(settling_steps, rows=8)
        stages = [adapters.Stage("one", 78, data), adapters.Stage("two", 2, data)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(adapters, "CHECKED", (1,))
            config = adapters.adapter_config("tsw", 8)
            lasting = (example("lasting").LastingOptions(1, lr=1e-6, questions=1, long=False),)
            return adapters.train_adapter(config, options, stages, settling, SHIPPED / "backbone", lasting)

    return output / "tsw", train(8), train


def losses(output, stage):
    return [entry["answer_loss"] for entry in read_log(output / stage / "log.jsonl")]


def test_an_adapter_learns_to_recall(trained):
    output, figures, _ = trained
    first = losses(output, "one")
    assert len(first) == 78 and sum(first[-10:]) < sum(first[:10]) - 3.0
    found = figures["recall"]["1"]
    # 64 facts were asked for; a guess is right for two or three.
    assert found["memory"] >= 0.15 and found["empty"] <= 0.05 and found["context"] > 0.95


def test_a_stage_goes_on_where_the_one_before_ended(trained):
    output, _, _ = trained
    first, second = losses(output, "one"), losses(output, "two")
    assert len(second) == 2 and second[0] < sum(first[:10]) / 10 - 0.2


def test_its_file_says_how_it_was_trained(trained):
    output, figures, _ = trained
    assert json.loads((output / "training.json").read_text()) == figures
    assert [run["options"]["steps"] for run in figures["stages"].values()] == [78, 2]
    assert figures["stages"]["one"]["options"]["seed"] == 0 and figures["stages"]["one"]["adapter"]["rank"] == 8
    assert figures["settling"]["options"] == {"steps": 8, "rows": 8, "lr": 1.5e-3, "weight": 10.0, "seed": 0}
    (lasting,) = figures["lasting"]
    assert lasting["options"]["steps"] == 1 and lasting["talk_decay"] > 1 and not lasting["options"]["long"]
    model, _ = load_backbone(SHIPPED / "backbone")
    patch_model(model, output)


def test_settling_makes_a_memory_silent(trained):
    """And what was trained already is not trained again."""
    output, settled, train = trained
    before = {stage: (output / stage / "log.jsonl").stat().st_mtime_ns for stage in ("one", "two")}
    unsettled = train(1)
    assert before == {stage: (output / stage / "log.jsonl").stat().st_mtime_ns for stage in before}
    assert settled["settling"]["text_divergence"] < 0.8 * unsettled["settling"]["text_divergence"]


def test_the_divergence_of_an_empty_memory_is_zero():
    settle = example("settle")
    model, tokenizer = load_backbone(SHIPPED / "backbone")
    patch_model(model, DeltaMemConfig())
    texts = encode(tokenizer, [settle.draw_text(Random(seed)) for seed in range(3)])
    memory = MemoryState.zeros(model, 3)
    memory.frozen = True
    with torch.no_grad():
        assert abs(settle.text_divergence(model, texts, memory).item()) < 1e-6


# --- lasting


@functools.cache
def stating():
    """What a sentence looks like that states or changes a fact; "Baljin: 21." is cut in two, and not among them."""
    keys = {"code": world.people(False), "place": world.objects(False)}
    said = [(kind, text) for kind in keys for text in (*world.STATEMENTS[kind], *world.UPDATES[kind])]
    texts = [text.format(key=f"({'|'.join(keys[kind])})", value=f"({'|'.join(world.VALUES[kind])})")
             for kind, text in said if ":" not in text]  # fmt: skip
    return re.compile("|".join(texts))


def test_drawn_forms_state_nothing_and_a_fifth_is_held_out():
    """No form that is trained on is one that is asked about, and none of either states a fact."""
    random = Random(3)
    drawn = {held_out: [forms.draw_form(random, held_out) for _ in range(2000)] for held_out in (False, True)}
    patterns = {held_out: set(map(forms.pattern, found)) for held_out, found in drawn.items()}
    assert len(patterns[False]) > 1500 and len(patterns[True]) > 1000
    assert not patterns[False] & (patterns[True] | set(map(forms.pattern, forms.HELD_OUT)))
    for form in (*drawn[False], *drawn[True], *forms.HELD_OUT):
        sentence = forms.fill(random, form, held_out=False)
        assert not stating().search(sentence) and "{" not in sentence and "<" not in sentence, sentence
    assert "<verb>" in forms.pattern("Nobody sang.") and forms.states("The {object} is in the {place}.")


def long_episodes(count=12):
    random = Random(7)
    return [example("talking").draw_long_episode(random, 4, 120, 3) for _ in range(count)]


def test_long_episodes_state_their_facts_among_talk():
    for episode in long_episodes():
        texts = [m["content"] for m in episode.told]
        sentences = [text[a:b].strip() for text in texts for a, b in sentence_spans(text)]
        assert len(sentences) == len(episode.states) and 0 < sum(episode.states) < len(sentences)
        for sentence, states in zip(sentences, episode.states):
            assert not (states and sentence.startswith(("Nobody", "The rain", "What"))), sentence
            assert states or not stating().search(sentence), sentence
        told = " ".join(s for s, states in zip(sentences, episode.states) if states)
        for *visible, _, answer in episode.asked:
            seen = " ".join(message["content"] for message in visible)
            assert re.search(rf"\b{answer['content']}\b", f"{told} {seen}")


def values_said(messages) -> dict[str, list[str]]:
    """Key → the values that a chat states of it, in order."""
    said = [text for kind in world.KINDS for text in (*world.UPDATES[kind], *world.STATEMENTS[kind])]
    forms = [re.compile(text.format(key="(?P<key>.+)", value=r"(?P<value>\w+)")) for text in said]
    found = {}
    for sentence in re.split(r"(?<=\.) ", " ".join(message["content"] for message in messages)):
        match = next((match for form in forms if (match := form.fullmatch(sentence))), None)
        if match is not None:
            found.setdefault(match["key"], []).append(match["value"])
    return found


def test_revised_facts_are_asked_for_by_their_newest_value():
    """At revisions=1 a fact is overwritten behind each, and each question asks for one of those, which holds."""
    random, overwritten = Random(5), 0
    for _ in range(12):
        episode = example("talking").draw_long_episode(random, 3, 0, 4, revisions=1.0, about_revised=1.0)
        values = values_said(episode.told)
        for question, answer in episode.asked:
            key = next(key for key in values if key in question["content"])
            assert len(values[key]) > 1 and answer["content"] == values[key][-1], (values, question, answer)
            overwritten += answer["content"] != values[key][0]
    assert overwritten > 24


def test_the_lasting_options_are_checked(capsys):
    main = example("lasting").main
    for name, value, allowed in (
        ("--revisions", "1.5", "0 to 1"),
        ("--about-revised", "nan", "0 to 1"),
        ("--rows", "0", "1 or more"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["--adapter", str(SHIPPED / "tsw-r8"), "--output", "unused", name, value])
        assert f"{name}: got" in (said := capsys.readouterr().err) and f"allowed {allowed}" in said


def test_talk_is_what_states_nothing():
    tokenizer = build_tokenizer()
    batch, talk = example("lasting").make_batch(tokenizer, long_episodes(), segmented=False)
    for row in range(len(talk)):
        written = tokenizer.decode(batch.write_ids[row][talk[row]])
        assert not stating().search(written) and len(written) > 300
        stated = tokenizer.decode(batch.write_ids[row][~talk[row] & batch.write_mask[row]])
        assert "Nobody" not in stated and "Tell me" not in stated and stated
    answers = [tokenizer.decode(labels[labels != -100]).strip() for labels in batch.labels]
    asked = [chat[-1]["content"] for episode in long_episodes() for chat in episode.asked]
    assert answers == [f"{answer}<|end|>" for answer in asked]


@pytest.mark.parametrize("strategy", ["tsw", "ssw", "msw"])
def test_the_decay_is_the_sum_of_the_gates_on_talk(strategy):
    lasting, (model, tokenizer) = example("lasting"), load_backbone(SHIPPED / "backbone")
    patch_model(model, SHIPPED / f"{strategy}-r8")
    batch, _ = lasting.make_batch(tokenizer, long_episodes(3), strategy == "ssw")
    with torch.no_grad(), lasting.recorded_inputs(model) as inputs, record_gates() as gates:
        write_memory(model, batch)
        decay = lasting.talk_decay(model, inputs, batch.write_mask, batch.segment_ids)
    written = int(batch.write_mask.sum()) if strategy != "ssw" else int((batch.segment_ids.amax(1) + 1).sum())
    means = torch.stack(list(gates.mean_beta().values())) * written * lasting.SPAN / batch.write_mask.sum()
    torch.testing.assert_close(decay.mean(1), means, rtol=1e-3, atol=1e-4)


def test_talk_comes_to_write_less(monkeypatch):
    lasting, (model, tokenizer) = example("lasting"), load_backbone(SHIPPED / "backbone")
    monkeypatch.setattr(lasting, "LENGTHS", ((1.0, 4, 20, 60),))
    patch_model(model, SHIPPED / "ssw-r8")
    options = lasting.LastingOptions(steps=12, lr=3e-3, most_facts=2, questions=1, gate_weight=1.0)
    step = lasting.Steps(tokenizer, options, segmented=True)[0]
    with torch.no_grad():
        before = lasting.lasting_losses(model, step)[2].mean()
    lasting.make_lasting(model, tokenizer, options)
    with torch.no_grad():
        assert lasting.lasting_losses(model, step)[2].mean() < 0.9 * before


# --- the command


@pytest.mark.soak
def test_the_command_trains_what_is_missing(tmp_path, capsys):
    main = example("__main__").main
    shutil.copytree(SHIPPED / "backbone", tmp_path / "backbone")
    options = ["--output", str(tmp_path), "--only", "backbone", "tsw-r4-short", "--steps", "1"]
    assert main(options) == 0
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"backbone", "few.jsonl", "many.jsonl", "tsw-r4-short"}
    model, _ = load_backbone(tmp_path / "backbone")
    patch_model(model, tmp_path / "tsw-r4-short")
    shutil.rmtree(tmp_path / "backbone")
    with pytest.raises(SystemExit, match="2"):
        main(options[:2] + ["--only", "tsw-r8"])
    assert "backbone holds no trained backbone; train it first (--only backbone)" in capsys.readouterr().err


def test_the_benchmark_trains_nothing(capsys):
    with pytest.raises(SystemExit, match="2"):
        importlib.import_module("bench.recall.__main__").main(["train"])
    assert "invalid choice: 'train'" in capsys.readouterr().err
