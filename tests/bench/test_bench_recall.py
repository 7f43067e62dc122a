"""make recall: conversations, retrieval, figures, perplexity, and what is written of them."""

import importlib
import math
import re
from pathlib import Path
from random import Random

import pytest
import torch
from support import loud_adapter
from transformers import Qwen3Config, Qwen3ForCausalLM

from deltamem_fast import DeltaMemConfig, patch_model, save_adapter, unpatch_model
from deltamem_fast.recall.chats import encode
from deltamem_fast.recall.task import Fact
from deltamem_fast.recall.tokenizer import build_tokenizer

pytest.importorskip("bm25s")
ADAPTERS = {
    "tsw-r8": DeltaMemConfig.tsw(),
    "ssw-r8": DeltaMemConfig.ssw("sentence_mean"),
    "msw-r8": DeltaMemConfig.msw(heads=2),
}


def recall(name):
    return importlib.import_module(f"bench.recall.{name}")


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.3,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Qwen3ForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def weights(model, tokenizer, tmp_path_factory):
    """A folder as the shipped one, with untrained weights and without the other ranks."""
    directory = tmp_path_factory.mktemp("weights")
    model.save_pretrained(directory / "backbone")
    tokenizer.save_pretrained(directory / "backbone")
    for name, config in ADAPTERS.items():
        patch_model(model, config)
        save_adapter(loud_adapter(model, scale=0.2), directory / name)
        unpatch_model(model)
    return directory


@pytest.fixture(scope="module")
def rows(model, tokenizer, weights):
    """All rows, of one episode."""
    return recall("curves").measure(model, tokenizer, weights, episodes=1)


@pytest.fixture
def patched(model, weights):
    def patch(name):
        return patch_model(model, weights / name)

    yield patch
    if hasattr(model, "_delta_memory_patch"):
        unpatch_model(model)


def one(rows, name, **parameters):
    (row,) = (row for row in rows if row.name == name and row.parameters == parameters)
    return row


# --- conversations


def tokens(tokenizer, messages):
    return int(encode(tokenizer, [messages]).attention_mask.sum()) if messages else 0


@pytest.mark.parametrize("count", [0, 16, 17, 32, 300])
def test_filler_has_the_tokens_asked_for(tokenizer, count):
    sentences, messages = recall("conversations").filler(Random(count), tokenizer, count)
    assert tokens(tokenizer, messages) == count
    assert " ".join(message["content"] for message in messages) == " ".join(sentences)
    assert not re.search(r"\d|code", " ".join(sentences))


def test_filler_refuses_what_it_cannot_make(tokenizer):
    with pytest.raises(ValueError, match="tokens: got 5, allowed 0, or 16 or more"):
        recall("conversations").filler(Random(0), tokenizer, 5)


def test_distance_is_counted_from_the_last_fact(tokenizer):
    conversations = recall("conversations")
    far = conversations.distant(Random(1), tokenizer, facts=2, distance=128)
    near = conversations.plain(Random(1), tokenizer, facts=2)
    assert far.questions == near.questions and far.told[: len(near.told)] == near.told
    assert tokens(tokenizer, far.told) == tokens(tokenizer, near.told) + 128


@pytest.mark.parametrize("text", ["random", "contradictions", "other facts", "talk", "new talk"])
def test_hostile_text_comes_behind_the_facts(tokenizer, text):
    conversations = recall("conversations")
    talk = conversations.hostile(Random(3), tokenizer, facts=4, text=text, tokens=50)
    near = conversations.plain(Random(3), tokenizer, facts=4)
    assert talk.questions == near.questions and talk.told[: len(near.told)] == near.told
    assert 50 <= tokens(tokenizer, talk.told) - tokens(tokenizer, near.told) < 90
    behind = talk.sentences[4:]
    keys = [question.fact.key for question in talk.questions]
    named = [any(key in sentence for key in keys) for sentence in behind]
    assert all(named) or text != "contradictions"
    assert not any(named) or text != "other facts"
    stating = [re.search(r"\d\d\.| in the \w+\.|: \w+\.", sentence) is not None for sentence in behind]
    assert text in ("random", "new talk") or all(stating) is (text != "talk")


@pytest.mark.parametrize("name", ["tsw-r8", "msw-r8"])
def test_what_is_left_and_what_talk_wrote_make_the_state(tokenizer, patched, name):
    fading, conversations, model = recall("fading"), recall("conversations"), patched(name)
    talks = [conversations.distant(Random(seed), tokenizer, facts=2, distance=48) for seed in range(3)]
    parts = fading.whole_parts(model, tokenizer, talks, 48)
    memory = fading.tell(model, tokenizer, [talk.told for talk in talks])
    for index, part in parts.items():
        torch.testing.assert_close(part.left + part.talk, memory[index], rtol=1e-4, atol=1e-5)
        assert (part.left - part.facts).abs().max() > 1e-3


def test_talk_told_apart_is_the_same_talk(tokenizer):
    fading, talk = recall("fading"), recall("conversations").distant(Random(1), tokenizer, facts=2, distance=300)
    first, rest = fading.split(talk, 2)
    assert first + rest == talk.told and tokens(tokenizer, rest) == 300
    contexts = fading.pieces(tokenizer, rest, 100)
    assert [m for context in contexts for m in context] == rest and len(contexts) >= 3
    assert all(tokens(tokenizer, context) <= 100 for context in contexts)


def test_asked_are_eight_at_most():
    conversations = recall("conversations")
    assert [len(conversations.plain(Random(0), None, facts=n).questions) for n in (1, 8, 32)] == [1, 8, 8]


@pytest.mark.parametrize("revisions", [0, 1, 3])
def test_revisions_come_last_and_the_newest_value_holds(revisions):
    talk = recall("conversations").revised(Random(5), None, facts=4, revisions=revisions)
    newest, *others = talk.questions
    assert newest.part == "newest" and [question.part for question in others] == ["kept"] * 3
    assert len(talk.sentences) == 4 + revisions
    for sentence in talk.sentences[4:]:
        assert newest.fact.key in sentence
    assert newest.fact.value not in newest.before and bool(newest.before) is bool(revisions)
    last = [sentence for sentence in talk.sentences if newest.fact.key in sentence][-1]
    assert newest.fact.value in last
    assert " ".join(message["content"] for message in talk.told) == " ".join(talk.sentences)


def test_the_newer_half_stays_in_sight():
    talk = recall("conversations").halved(Random(2), None, facts=5)
    told, seen = (" ".join(m["content"] for m in messages) for messages in (talk.told, talk.visible))
    parts = [(question.part, question.fact.key in told, question.fact.key in seen) for question in talk.questions]
    assert parts == [("older", True, False)] * 3 + [("newer", False, True)] * 2


# --- retrieval


def test_bm25_finds_the_statement():
    conversations, index = recall("conversations"), recall("variants").Index
    random, hits = Random(0), {1: [], 4: []}
    for _ in range(20):
        talk = conversations.plain(random, None, facts=8)
        found = index(talk.sentences)
        for fact in (question.fact for question in talk.questions):
            for count, seen in hits.items():
                best = found.best(fact.question(), count)
                assert len(best) == count
                seen.append(any(fact.key in sentence and fact.value in sentence for sentence in best))
    assert sum(hits[1]) >= 0.85 * len(hits[1]) and sum(hits[4]) >= 0.99 * len(hits[4])


def test_bm25_keeps_the_order_and_takes_the_newer_of_equals():
    sentences = ["The red lamp is in the cave.", "Nobody sang.", "The old cup is here.", "The red lamp is in the hall."]
    index = recall("variants").Index(sentences)
    assert index.best("Where is the red lamp?", 1) == sentences[3:]
    assert index.best("Where is the red lamp?", 2) == [sentences[0], sentences[3]]
    assert index.best("Something else entirely?", 9) == sentences


# --- what a question sees


def readers(monkeypatch):
    """Let a reader answer that knows what it sees, and of a memory what it was told."""
    variants = recall("variants")

    class Told(list):
        def select(self, rows):
            return Told(self[row] for row in rows)

    def read(text, question):
        key = re.search(r"(?:code of|Where is the) ([\w ]+)\?", question)[1]
        said = [sentence for sentence in re.split(r"(?<=\.) ", text) if key in sentence]
        return re.search(r"(\w+)\.$", said[-1])[1] if said else ""

    def ask(model, tokenizer, chats, memory):
        told = memory if memory is not None else [""] * len(chats)
        seen = [" ".join(message["content"] for message in chat[:-1]) for chat in chats]
        return [
            read(text, chat[-1]["content"]) or read(known, chat[-1]["content"])
            for text, known, chat in zip(seen, told, chats)
        ]

    def tell(model, tokenizer, chats):
        return Told(" ".join(message["content"] for message in chat) for chat in chats)

    monkeypatch.setattr(variants, "ask", ask)
    monkeypatch.setattr(variants, "tell", tell)
    monkeypatch.setattr(variants.MemoryState, "zeros", lambda model, count: Told([""] * count))
    monkeypatch.setattr(variants, "BATCH", 2000)  # several batches
    return variants


def test_each_variant_sees_what_it_says(monkeypatch):
    variants, conversations, figures = readers(monkeypatch), recall("conversations"), recall("figures")

    def values(variant, draw, **point):
        talks = [draw(Random(f"{i}"), None, **point) for i in range(6)]
        return figures.point(talks, variants.answers(None, None, variant, talks))

    for variant in (variants.MEMORIES[0], variants.CONTEXT, variants.BM25_4, variants.TOGETHER):
        assert values(variant, conversations.plain, facts=12)["share"] == 1.0, variant.name
        assert values(variant, conversations.revised, facts=4, revisions=2)["newest"] == 1.0 or variant.retrieved
    for variant in (variants.FROZEN, variants.EMPTY):
        assert values(variant, conversations.plain, facts=12)["share"] == 0.0, variant.name
    half = values(variants.FROZEN, conversations.halved, facts=8)
    assert (half["older"], half["newer"], half["share"]) == (0.0, 1.0, 0.5)
    assert values(variants.MEMORIES[0], conversations.halved, facts=8)["share"] == 1.0


def test_batches_are_consecutive_and_bounded(monkeypatch):
    variants = recall("variants")
    monkeypatch.setattr(variants, "BATCH", 10)
    found = list(variants._batches([3, 3, 3, 6, 1, 20, 2]))
    assert [(part.start, part.stop) for part in found] == [(0, 3), (3, 4), (4, 5), (5, 6), (6, 7)]


# --- figures


def test_standard_errors():
    figures = recall("figures")
    assert figures.standard_error(0.5, 100) == pytest.approx(0.05)
    assert figures.standard_error(0.2, 64) == pytest.approx(0.05)
    assert figures.standard_error(1.0, 9) == 0.0
    found, error = figures.ratio(0.8, 0.4, 100, 100)
    # The relative errors add in squares: 0.04 / 0.8 and 0.0490 / 0.4.
    assert found == pytest.approx(2.0) and error == pytest.approx(2 * math.hypot(0.05, math.sqrt(0.24) / 4))
    assert figures.ratio(0.5, 0.0, 10, 10) is None


def test_figures_of_a_point():
    conversations, figures = recall("conversations"), recall("figures")
    revised = conversations.Question(Fact("code", "Balton", "12"), "newest", ("34", "56"))
    kept = conversations.Question(Fact("place", "old lamp", "cave"), "kept")
    talk = conversations.Conversation([], [], [revised, kept])
    found = figures.point([talk] * 4, [["12", "cave"], ["34", "cave"], ["56", "cave"], ["78", "hall"]])
    assert (found["share"], found["asked"], found["error"]) == (0.5, 8, pytest.approx(math.sqrt(0.25 / 8), abs=1e-5))
    assert (found["newest"], found["stale"], found["kept"]) == (0.25, 0.5, 0.75)
    assert found["stale_error"] == pytest.approx(0.25)
    assert found["chance"] == pytest.approx((1 / 50 + 1 / 30) / 2, abs=1e-5)
    with pytest.raises(ValueError):
        figures.point([talk], [["12"]])


# --- perplexity


def test_losses_are_the_sum_over_all_tokens_but_the_first(model, tokenizer):
    perplexity = recall("perplexity")
    texts = perplexity.draw_texts(2)
    found = perplexity.losses(model, tokenizer, texts, None)
    for text, (loss, count) in zip(texts, found.tolist()):
        ids = encode(tokenizer, [text.messages]).input_ids
        expected = model(ids, labels=ids).loss.item()
        assert count == ids.shape[1] - 1
        assert loss / count == pytest.approx(expected, rel=1e-4)


def test_other_facts_are_about_others():
    for text in recall("perplexity").draw_texts(20):
        said = " ".join(message["content"] for message in text.messages)
        names = re.findall(r"\b[A-Z][a-z]+", " ".join(message["content"] for message in text.elsewhere))
        known = {"The", "Remember", "Somebody", "You"}
        assert len(text.elsewhere) >= 2 and not any(name in said for name in set(names) - known)


@pytest.mark.parametrize("name", ["tsw-r8", "msw-r8"])
def test_a_live_memory_reads_as_in_one_forward(tokenizer, patched, name):
    """Message by message, with padding between, is token by token."""
    perplexity, model = recall("perplexity"), patched(name)
    texts = perplexity.draw_texts(2)
    found = perplexity.losses(model, tokenizer, texts, "live")
    for text, (loss, count) in zip(texts, found.tolist()):
        ids = encode(tokenizer, [text.messages]).input_ids
        with torch.no_grad():
            assert loss / count == pytest.approx(model(ids, labels=ids).loss.item(), rel=1e-4)


def test_each_memory_is_another_one(tokenizer, patched, model):
    perplexity = recall("perplexity")
    texts = perplexity.draw_texts(2)
    frozen = perplexity.losses(model, tokenizer, texts, None)
    for name in ADAPTERS:
        patched(name)
        empty, filled, live = (perplexity.losses(model, tokenizer, texts, memory) for memory in perplexity.MEMORIES)
        torch.testing.assert_close(empty, frozen, rtol=1e-5, atol=0)
        for one, other in ((filled, frozen), (live, frozen), (filled, live)):
            assert ((one - other)[:, 0].abs() / frozen[:, 0]).max() > 1e-4, name
        unpatch_model(model)


def test_the_ratio_of_perplexities():
    perplexity = recall("perplexity")
    frozen = torch.tensor([[20.0, 10.0], [60.0, 30.0]], dtype=torch.float64)
    more = frozen + torch.tensor([[0.1, 0.0], [0.3, 0.0]], dtype=torch.float64)
    assert perplexity.perplexity(frozen) == pytest.approx(math.exp(2))
    # One hundredth a token in every text: no spread.
    assert perplexity.ratio(more, frozen) == pytest.approx((math.exp(0.01), 0.0), abs=1e-9)
    more[1, 0] -= 0.4
    found, error = perplexity.ratio(more, frozen)
    assert found == pytest.approx(1.0, abs=1e-9) and error == pytest.approx(math.hypot(0.1, 0.1) / 40)


# --- the whole run


def test_every_row_is_there(rows):
    curves, perplexity, variants = recall("curves"), recall("perplexity"), recall("variants")
    expected = {
        (f"{name}/{variant.name}", *point.values())
        for name, curve in curves.CURVES.items() for variant in curve.variants for point in curve.points
    }  # fmt: skip
    kinds = (*perplexity.TEXTS, perplexity.EVERYTHING)
    expected |= {("perplexity/frozen", kind) for kind in kinds} | {("chance", "code"), ("chance", "place")}
    expected |= {
        (f"perplexity/{name}", kind, memory)
        for name in variants.STRATEGIES for kind in kinds for memory in perplexity.MEMORIES
    }  # fmt: skip
    found = [(row.name, *row.parameters.values()) for row in rows]
    assert len(found) == len(set(found)) and set(found) == expected
    for row in rows:
        missing = row.name in {f"facts/{name}" for name in variants.RANKS.values()}
        assert row.status == ("absent" if missing else "measured"), row
        assert ("no adapter" in row.note) is missing
        assert not missing or not row.values
        assert missing or row.name.startswith("perplexity") or 0 <= row.values["share"] <= 1


def test_an_empty_memory_is_the_frozen_backbone(rows):
    for point in recall("curves").CURVES["facts"].points:
        empty, frozen = (one(rows, f"facts/{name}", **point) for name in ("empty memory", "frozen"))
        assert empty.values == frozen.values and frozen.values["asked"] >= 6
    for row in rows:
        if row.parameters.get("memory") == "empty":
            assert row.values["ratio"] == pytest.approx(1.0, abs=1e-5)


def test_the_model_is_bare_afterwards(rows, model, weights):
    assert not any("delta_memory" in name for name, _ in model.named_modules())


def test_fewer_episodes_stay_out_of_the_pages(weights, tmp_path, monkeypatch, capsys):
    curves, results = recall("curves"), importlib.import_module("bench.instrument.results")
    main = recall("__main__").main
    options = ["curves", "--weights", str(weights), "--only", "half", "--output", str(tmp_path)]
    assert main([*options, "--episodes", "1"]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert path.parent == tmp_path and path.stem.endswith("-half-quick")
    loaded = results.load(path)
    assert set(loaded.head["weights"]) == {"backbone", *ADAPTERS}
    assert {row.name.split("/")[0] for row in loaded.rows} == {"chance", "half"}
    assert results.latest(tmp_path) is None
    again = curves.fingerprints(weights)
    file = next((weights / "tsw-r8").glob("*.safetensors"))
    kept = file.read_bytes()
    file.write_bytes(kept[:-4] + b"\0\0\1\0")
    try:
        assert {name for name, digest in curves.fingerprints(weights).items() if again[name] != digest} == {"tsw-r8"}
    finally:
        file.write_bytes(kept)


def test_a_row_for_each_change_of_recipe(model, tokenizer, weights):
    recipe = recall("recipe")
    given = [("before", weights / "tsw-r8"), ("after", weights / "msw-r8")]
    first, second = recipe.measure(model, tokenizer, given, 1, lambda text: None)
    assert (first.name, first.parameters["change"]) == ("recipe/tsw-r8", "before")
    assert (second.name, second.parameters["change"]) == ("recipe/msw-r8", "after")
    assert first.parameters["weights"] != second.parameters["weights"]
    shares = {name for name in first.values if not name.endswith("error") and not name.startswith("perplexity")}
    talk = {"two_facts_1024", "eight_facts", "two_facts_1024_new_talk", "two_facts_1024_drawn_talk"}
    assert shares == talk | {"overwritten_once", "others_once", "overwritten_twice", "others_twice"} | {
        "newer_in_sight",
        "others_newer_in_sight",
        "newest_all_in_sight",
        "others_all_in_sight",
    }
    rows = recall("curves").measure(model, tokenizer, weights, 1, "overwriting")
    points = [row for row in rows if row.name == "overwriting/tsw-r8" and row.parameters["facts"] == 8]
    curve = {row.parameters["revisions"]: row.values for row in points}
    assert [first.values[f"overwritten_{times}"] for times in ("once", "twice")] == [curve[n]["newest"] for n in (1, 2)]
    assert first.values["perplexity_filled"] != second.values["perplexity_filled"] > 0


@pytest.mark.parametrize("arguments, said", [
    (["recipe", "no directory"], "adapter: got 'no directory', allowed CHANGE=DIRECTORY"),
    (["fading", "--episodes", "0"], "--episodes: got 0, allowed 1 or more"),
    (["curves", "--episodes", "0"], "--episodes: got 0, allowed 1 or more"),
    (["curves", "--weights", "/nowhere"], "/nowhere"),
])  # fmt: skip
def test_errors_of_the_command(capsys, arguments, said):
    assert recall("__main__").main(arguments) == 2
    captured = capsys.readouterr()
    assert said in captured.err and captured.out == ""


# --- what is made of the rows


@pytest.fixture
def whole(rows):
    """The rows as a whole result of some machine."""
    results = importlib.import_module("bench.instrument.results")
    result = results.collect(rows, "cpu", {"quick": False, "only": None, "episodes": 1})
    result.head |= {"parameters": 1_000_000, "weights": {}, "commit": "abc1234", "dirty": False}
    return result


def test_a_result_reads_back(whole, tmp_path):
    results = importlib.import_module("bench.instrument.results")
    assert results.load(results.write(tmp_path, whole)) == whole
    assert results.latest(tmp_path) == whole


def report(name):
    return importlib.import_module(f"bench.report.{name}")


def test_the_page_is_checked(whole, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    results, ours = importlib.import_module("bench.instrument.results"), report("__main__")
    page = tmp_path / "README.md"
    page.write_text(f"before\n{ours.BEGIN}\n{ours.END}\n", encoding="utf-8")
    monkeypatch.setattr(ours, "README", page)
    options = ["--results", str(tmp_path / "results"), "--output", str(tmp_path / "docs")]
    (tmp_path / "docs").mkdir()
    assert ours.main(options) == 0
    assert "not measured yet" in (tmp_path / "docs" / "recall.md").read_text(encoding="utf-8")
    results.write(tmp_path / "results" / "recall", whole)
    assert ours.main([*options, "--check"]) == 1
    assert ours.main(options) == 0 and ours.main([*options, "--check"]) == 0
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"before\n{ours.BEGIN}\n") and text.endswith(f"{ours.END}\n")
    capsys.readouterr()
    row = one(whole.rows, "facts/full context", facts=8)
    row.values["share"] = 0.12345
    results.write(tmp_path / "results" / "recall", whole)
    assert ours.main([*options, "--check"]) == 1
    assert "+| full context |" in capsys.readouterr().out
    page.write_text("no markers", encoding="utf-8")
    assert ours.main(options) == 2
    assert "allowed once each" in capsys.readouterr().err


def test_the_tables_show_figures_and_what_is_missing(whole):
    pages = report("pages")
    one(whole.rows, "facts/tsw-r8", facts=8).values |= {"share": 0.875, "error": 0.0125}
    text = pages.recall(report("found").Found(recall=whole))
    line = next(line for line in text.splitlines() if line.startswith("| tsw-r8 |"))
    assert line.split(" | ")[4] == "87.5 ± 1.2"
    assert "a guess: code 2.0%, place 3.3%" in text and "1.0 M parameters" in text
    assert text.count(recall("variants").RANKS[32]) == 1 and text.lower().count(pages.NOT_YET) == 1
    tables = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    assert len(tables) == 7  # goals and six curves
    for table in tables:
        lines = table.splitlines()
        assert len({line.count("|") for line in lines}) == 1 and len(lines) > 4


def test_the_worst_row_decides():
    rows, targets = importlib.import_module("bench.instrument.rows"), recall("targets")
    half, *_ = targets.GOALS
    found = [
        rows.counted(half.name, {"facts": n}, ratio=x, ratio_error=0.1) for n, x in ((4, 1.4), (8, 1.3), (12, 2.0))
    ]
    assert half.worst(found) is found[1] and not half.met(1.3) and half.met(1.4)
    both = next(
        goal for goal in targets.GOALS if goal.name == "perplexity/msw-r8" and goal.parameters["memory"] == "filled"
    )
    found = [
        rows.counted(both.name, {"memory": memory, "text": text}, ratio=x)
        for memory, text, x in (("live", "all", 2.0), ("filled", "telling", 2.0), ("filled", "all", 1.0099))
    ]
    assert both.worst(found) is found[2] and both.met(1.0099)
    for ratio, met in ((1.011, False), (0.989, False), (0.991, True)):
        assert both.met(ratio) is met
    assert both.worst([]) is None


def test_every_goal_has_rows(rows):
    for goal in recall("targets").GOALS:
        assert any(row.name == goal.name and goal.parameters.items() <= row.parameters.items() for row in rows), goal


def test_ratios_are_to_the_frozen_backbone_at_the_same_point():
    counted, curves = importlib.import_module("bench.instrument.rows").counted, recall("curves")
    found = [
        counted("half/tsw-r8", {"facts": 4}, share=0.8, asked=100),
        counted("half/frozen", {"facts": 4}, share=0.4, asked=100),
        counted("half/tsw-r8", {"facts": 8}, share=0.6, asked=100),
        counted("half/frozen", {"facts": 8}, share=0.5, asked=100),
        counted("facts/tsw-r8", {"facts": 8}, share=0.6, asked=100),
    ]
    curves._add_ratios(found)
    assert [row.values.get("ratio") for row in found] == [2.0, None, 1.2, None, None]
    assert found[0].values["ratio_error"] == pytest.approx(recall("figures").ratio(0.8, 0.4, 100, 100)[1], abs=1e-5)


def test_pictures(whole, tmp_path):
    pytest.importorskip("matplotlib")
    plots = report("plots")
    # Two ranks, and ratios: the untrained backbone gets nothing right that there could be a ratio to.
    for row in whole.rows:
        if row.name in [f"facts/{name}" for name in recall("variants").RANKS.values()][:2]:
            row.status, row.values = "measured", {"share": 0.5, "error": 0.1}
        elif row.name == "half/tsw-r8":
            row.values |= {"ratio": 1.5, "ratio_error": 0.1}
    found = report("found").Found
    written = plots.draw(found(recall=whole, pictures=tmp_path / "a"))
    assert [path.name for path in written] == [f"{name}.png" for name in plots.RECALL]
    assert all(path.read_bytes().startswith(b"\x89PNG") and 2_000 < path.stat().st_size < 100_000 for path in written)
    assert plots.draw(found(recall=type(whole)(whole.head, []), pictures=tmp_path / "none")) == []
