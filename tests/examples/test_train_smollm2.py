"""examples/recall_smollm2: what is told and asked, what stays held out, and a short training on a stand-in."""

import json
import re
from dataclasses import replace
from random import Random

import pytest
import torch
from safetensors.torch import load_file
from smollm2_for_tests import CONFIGS, example, fewer, short, stand_in
from tokenizers_for_tests import default_system_tokenizer

from deltamem_fast import MemoryState, memory_disabled, patch_model
from deltamem_fast.adapter.record import identity_of
from deltamem_fast.memory.telling import writes_of
from deltamem_fast.memory.watch import capture_projections
from deltamem_fast.recall import talk
from deltamem_fast.training.setup import prepare_for_training


@pytest.fixture(scope="module")
def tokenizer():
    return default_system_tokenizer()


@pytest.fixture
def small(monkeypatch):
    fewer(monkeypatch)


def same(first, second):
    """Whether two runs have ended with one adapter, but for what batches of other shapes round otherwise."""
    name = "delta_mem_adapter.safetensors"
    first, second = load_file(first / name), load_file(second / name)
    return first.keys() == second.keys() and all(torch.allclose(first[k], second[k], 0, 1e-9) for k in first)


# --- facts


def said_in_training(episodes, words=None):
    """Everything that is told, asked and answered in many episodes of training."""
    for seed in range(600):
        found = episodes.draw_episode(Random(seed), 1 + seed % 8, words=words)
        yield from (message["content"] for message in found.told)
        yield from (text for q in found.questions for text in (q.text, q.answer))


def test_held_out_names_and_values_are_never_said_in_training():
    episodes, facts = example("episodes"), example("facts")
    held_out = {v for r in facts.RELATIONS for v in facts.part(r.values, True)} | set(facts.part(facts.NAMES, True))
    # A number or a color can be part of small talk, and a word of a longer value; those are no names.
    held_out = {value for value in held_out if value[0].isupper() and len(value) > 3 and value not in facts.DAYS}
    allowed = {v for r in facts.RELATIONS for v in facts.part(r.values, False)} | set(facts.part(facts.NAMES, False))
    held_out -= allowed  # a name that is another relation's value
    text = "\n".join(text for text in said_in_training(episodes) if "\n" not in text and len(text) < 300)
    assert len(held_out) > 60
    assert not [value for value in held_out if re.search(rf"\b{re.escape(value)}\b", text)]


def three_in_a_row(template):
    """Every three words of a template that stand side by side, without its value, as "I" says it and as others do."""
    found = set()
    for form in (r"\1", r"\2"):
        text = re.sub(r"\[([^|]*)\|([^\]]*)\]", form, template).replace("{v}", "").lower()
        words = re.findall(r"[a-z']+|\{.\}", text)
        found |= set(zip(words, words[1:], words[2:]))
    return found


def test_sentences_of_the_test_are_of_a_kind_that_training_lacks():
    facts, requests = example("facts"), ("Remind me", "Tell me")
    for relation in facts.RELATIONS:
        known = set().union(*map(three_in_a_row, relation.trained))
        for sentence in (*relation.new_statements, *relation.new_questions):
            assert not known & three_in_a_row(sentence), sentence
        told = set().union(*map(three_in_a_row, relation.new_statements))
        assert not any(told & three_in_a_row(sentence) for sentence in relation.new_questions), relation.name
        assert not any(q.startswith(requests) for q in relation.questions), relation.name
        assert all(q.startswith(requests) for q in relation.new_questions), relation.name


def test_the_demos_sentences_are_none_of_trainings():
    facts = example("facts")
    subjects = facts.ME, facts.kin("sister"), facts.named("Walter"), facts.named("Diana")
    said = {
        facts.Fact(subject, relation, value)._say(text)
        for relation in facts.RELATIONS
        for text in (*relation.statements, *relation.updates)
        for value in relation.values
        for subject in subjects
    }
    assert "Diana plays the violin." in said and "My sister moved to Boston last week." in said
    assert not said & {told.statement for told in (*talk.TOLD, talk.REVISED)}
    assert {"Walter", "Diana"} <= set(facts.part(facts.NAMES, held_out=True))
    asked = {
        facts.Fact(s, r, r.values[0])._say(text) for r in facts.RELATIONS for text in r.questions for s in subjects
    }
    assert {told.question for told in talk.TOLD} <= asked


def test_every_answer_names_its_value_and_the_value_was_told():
    draw = example("episodes").draw_episode
    for seed in range(200):
        found = draw(Random(seed), 1 + seed % 8, talks=0.0)
        told = " ".join(message["content"] for message in found.told)
        for question in found.questions:
            assert question.value in question.answer and question.value in told


def test_words_leave_held_out_values_out(monkeypatch):
    facts = example("facts")
    monkeypatch.setattr(facts, "PAIRED", 0.0)
    words = facts.Words(("lamp", "ocean"), ("Lantern",))
    assert words.instead_of("a nurse", Random(0)) in ("a lamp", "an ocean")
    assert words.instead_of("Oslo", Random(0)) == "Lantern"
    assert words.instead_of("March 3", Random(0)) == "March 3" and words.instead_of("noon", Random(0)) == "noon"

    class Vocabulary:
        @staticmethod
        def get_vocab():
            return {
                "Ġlamp": 9,
                "ĠParis": 3,
                "ĠLantern": 4,
                "lamp": 5,
                "Ġx1": 6,
                "Ġnurse": 7,
                "ing": 1,
                "Ġfavourite": 8,
                "ĠGrace": 10,
                "Ġboss": 11,
            }

    found = facts.Words.of(Vocabulary)
    # Paris and nurse are held out, sentences have "favourite" of their own, and the others are people.
    assert (found.lower, found.capital, found.pieces) == (("lamp",), ("Lantern",), ("ing", "lamp"))
    assert {"paris", "nurse"} <= found.refused


def test_a_value_is_found_where_it_stands_as_a_word():
    facts = example("facts")
    said = "You should know that Anna's hat is a hat."
    assert facts.place_of("hat", said, 0, len(said)) == (37, 40) and said[37:40] == "hat"
    assert facts.place_of("hat", said, 0, 36) == (28, 31)
    with pytest.raises(ValueError, match="^value: 'cat' does not stand in "):
        facts.place_of("cat", said, 0, len(said))


def test_some_words_have_several_tokens_and_none_is_a_held_out_value(monkeypatch):
    facts = example("facts")
    words = facts.Words(("lamp",), ("Lan",), pieces=("tern", "cet"), refused=frozenset({"lancet"}))
    drawn = {words.instead_of("Oslo", Random(seed)) for seed in range(200)}
    assert drawn == {"Lan", "Lantern", "Lan Lan"}


# --- tokens


def test_what_counts_of_an_answer_is_its_value(tokenizer):
    pool, episodes = example("pool"), example("episodes")
    encoder = pool.Encoder(tokenizer, CONFIGS["msw"])
    questions = [
        episodes.Question("Where do I live?", "You live in Oslo.", "Oslo"),
        episodes.Question("What is my job?", "You work as a nurse.", "nurse"),
    ]
    for system in (True, False):
        found = encoder.asked(questions, system=system)
        text = tokenizer.decode(found.ids)
        assert text.startswith("<|im_start|>system" if system else "<|im_start|>user\nWhere do I live?")
        valued = [i for i, w in zip(found.ids, found.weights) if w == 1.0]
        assert tokenizer.decode(valued).replace(" ", "") == "Oslonurse"
        counted = [i for i, w in zip(found.ids, found.weights) if w]
        assert tokenizer.decode(counted, skip_special_tokens=True) == "You live in Oslo.You work as a nurse."
        assert sum(i == tokenizer.eos_token_id for i in counted) == 2
    chat = [m for q in questions for m in (episodes.message("user", q.text), episodes.message("assistant", q.answer))]
    assert encoder.asked(questions).ids == encoder.ids(encoder.render(chat))


def test_segments_go_with_their_tokens(tokenizer):
    pool, episodes = example("pool"), example("episodes")
    encoder = pool.Encoder(tokenizer, CONFIGS["ssw"])
    chat = [episodes.message("user", "I live in Oslo. Ben has a cat.")]
    whole, short = encoder.told(chat), encoder.told(chat, system=False)
    assert max(whole.segments) == max(short.segments) == 1
    assert whole.ids[-len(short.ids) :] == short.ids and whole.segments[-len(short.ids) :] == short.segments
    assert set(whole.segments[: -len(short.ids)]) == {-1}


# --- the halves of a model


def test_upper_layers_on_kept_outputs_are_the_whole_model(tokenizer):
    halves = example("halves")
    model = patch_model(stand_in(tokenizer), CONFIGS["msw"], backend="reference")
    kept: dict = {}
    lower = halves.LowerOutputs(model, 1, kept=kept)
    rows = [[5, 6, 7, 8, 9], [10, 11, 12]]
    memories = [MemoryState.zeros(model, 2) for _ in range(2)]
    with torch.no_grad():
        hidden, mask = lower(rows)
        with halves.upper_layers(model, 1):
            upper = model(inputs_embeds=hidden, attention_mask=mask, memory=memories[0], use_cache=False).logits
        ids = torch.tensor([rows[0], rows[1] + [0, 0]])
        whole = model(ids, attention_mask=mask, memory=memories[1], use_cache=False).logits
    assert mask.tolist() == [[True] * 5, [True] * 3 + [False] * 2]
    torch.testing.assert_close(upper[mask], whole[mask], rtol=0, atol=1e-5)
    for layer, state in memories[0].items():
        torch.testing.assert_close(state, memories[1][layer], rtol=0, atol=1e-6)
    assert {key: tuple(value.shape) for key, value in kept.items()} == {tuple(row): (len(row), 64) for row in rows}
    with pytest.MonkeyPatch.context() as patch:  # nothing is computed again, for another adapter neither
        patch.setattr(model.model.layers[0], "forward", None)
        for other in (lower, halves.LowerOutputs(model, 1, kept=kept)):
            again, _ = other(rows[::-1])
            assert torch.equal(again[1], hidden[0])


def test_layers_are_put_back_after_an_error(tokenizer):
    halves = example("halves")
    model = stand_in(tokenizer)
    before, norm = model.model.layers, model.model.norm
    with pytest.raises(KeyError), halves.upper_layers(model, 1), halves.detached_layers(model):
        raise KeyError
    assert model.model.layers is before and model.model.norm is norm
    assert not any(layer._forward_hooks for layer in before)


def test_telling_detached_has_the_writes_gradient(tokenizer):
    """Where nothing is read while telling, leaving the layers' graph out changes no gradient."""
    halves, episodes, pool, train = (example(name) for name in ("halves", "episodes", "pool", "train"))
    found = []
    for detached in (True, False):
        model = patch_model(stand_in(tokenizer), replace(CONFIGS["msw"], output_init="zero"), backend="reference")
        prepare_for_training(model)
        with torch.no_grad():  # only the last layer reads, so nothing that is written depends on a read
            torch.manual_seed(0)
            model.model.layers[2].self_attn.delta_memory.delta_o_proj.normal_()
        trainee = train.Trainee(model, CONFIGS["msw"])
        encoder = pool.Encoder(tokenizer, CONFIGS["msw"])
        told = encoder.told([episodes.message("user", "I live in Oslo.")])
        memory = MemoryState.zeros(model)
        if detached:
            trainee.tell([[told]], memory)
        else:
            hidden, mask = trainee.lower([told.ids])
            with halves.upper_layers(model, 1):
                model.model(inputs_embeds=hidden, attention_mask=mask, memory=memory, use_cache=False)
        loss, _ = trainee.answer([encoder.asked([episodes.Question("Where?", "In Oslo.", "Oslo")])], memory)
        loss.backward()
        found.append(model.model.layers[2].self_attn.delta_memory.memory_v_proj.grad.clone())
    assert found[0].abs().max() > 0
    torch.testing.assert_close(found[0], found[1])


# --- a run


@pytest.mark.parametrize("strategy", CONFIGS)
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not(strategy, tokenizer, tmp_path, small, monkeypatch):
    train = example("train")
    monkeypatch.setattr(train, "PROMOTED", 0.0)
    config = CONFIGS[strategy]
    options = short(train)
    exact = torch.float64
    assert train.train(stand_in(tokenizer, exact), tokenizer, config, options, tmp_path / "whole")
    assert not train.train(stand_in(tokenizer, exact), tokenizer, config, options, tmp_path / "parts", seconds=0.0)
    about = json.loads((tmp_path / "parts/training.json").read_text())
    assert about["steps"] == 1 and about["calibration"] == []
    assert train.train(stand_in(tokenizer, exact), tokenizer, config, options, tmp_path / "parts")
    about = (tmp_path / "parts/training.json").read_bytes()
    assert json.loads(about)["steps"] == 4
    # The most that any of a run's processes took, whichever calibrates.
    state = torch.load(tmp_path / "parts/checkpoint.pt", weights_only=True)
    assert json.loads(about)["peak_bytes"] >= state["peak"][0] > 1e8 and json.loads(about)["peak_from"] == 0
    torch.save(state | {"peak": (10**15, 0)}, tmp_path / "parts/checkpoint.pt")
    settings = [list(tried["setting"].values()) for tried in json.loads(about)["calibration"]]
    assert settings[:2] == [[0, 1, 1], [-2, 1, 1]]
    # It is finished already; and once more, as if its adapter had not been written.
    assert train.train(stand_in(tokenizer, exact), tokenizer, config, options, tmp_path / "parts")
    assert (tmp_path / "parts/training.json").read_bytes() == about
    (tmp_path / "parts/training.json").write_text('{"steps": 1}')
    assert train.train(stand_in(tokenizer, exact), tokenizer, config, options, tmp_path / "parts")
    assert json.loads((tmp_path / "parts/training.json").read_text())["steps"] == 4
    assert json.loads((tmp_path / "parts/training.json").read_text())["peak_bytes"] == 10**15
    assert same(tmp_path / "whole", tmp_path / "parts")
    log = [json.loads(line) for line in (tmp_path / "whole/log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [2, 4] and log[1]["level"] == 1 and "divergence" in log[1]
    patched = patch_model(stand_in(tokenizer), tmp_path / "whole", backend="reference")
    memory = patched.model.layers[1].self_attn.delta_memory
    for projection, null in ((memory.memory_k_proj, 1), (memory.memory_q_proj, 0)):
        rows = projection.unflatten(0, (-1, 4))
        assert not rows[:, null].any() and rows[:, 1 - null].all()
    lengths = memory.memory_q_proj.unflatten(0, (-1, 4))[:, 2:].norm(dim=-1)
    assert lengths.max() < 1.0001 * example("calibrate").QUERIES * example("start").QUIET


def test_a_finished_run_is_prolonged_from_its_last_step_at_the_full_rate(tokenizer, tmp_path, small):
    train, config = example("train"), CONFIGS["msw"]
    for steps in (4, 6):
        model = stand_in(tokenizer, torch.float64)
        assert train.train(model, tokenizer, config, short(train, steps=steps), tmp_path / "grown")
    with pytest.raises(ValueError, match=r"^steps: got 4, allowed 6 or more: .*constant\.pt is of step 3$"):
        train.train(stand_in(tokenizer, torch.float64), tokenizer, config, short(train, steps=4), tmp_path / "grown")
    model = stand_in(tokenizer, torch.float64)
    assert train.train(model, tokenizer, config, short(train, steps=6), tmp_path / "at once")
    assert same(tmp_path / "grown", tmp_path / "at once")
    logs = [(tmp_path / run / "log.jsonl").read_text().splitlines() for run in ("grown", "at once")]
    assert [[json.loads(line)["step"] for line in log] for log in logs] == [[2, 4, 6]] * 2


def test_a_run_with_other_options_is_refused(tokenizer, tmp_path, small):
    train = example("train")
    train.train(stand_in(tokenizer), tokenizer, CONFIGS["msw"], short(train), tmp_path / "run", seconds=0.0)
    with pytest.raises(ValueError, match=r"^output: .*checkpoint\.pt is of a run with seed 0 \(now 1\); remove it, "):
        train.train(stand_in(tokenizer), tokenizer, CONFIGS["msw"], short(train, seed=1), tmp_path / "run")


def test_a_run_of_another_version_is_refused(tokenizer, tmp_path, small, monkeypatch):
    train = example("train")
    train.train(stand_in(tokenizer), tokenizer, CONFIGS["msw"], short(train), tmp_path / "run", seconds=0.0)
    monkeypatch.setattr(train, "VERSION", train.VERSION + 1)
    with pytest.raises(
        ValueError, match=r"^output: .*checkpoint\.pt is of another version of this training; remove it$"
    ):
        train.train(stand_in(tokenizer), tokenizer, CONFIGS["msw"], short(train), tmp_path / "run")


def to_start(strategy, tokenizer, monkeypatch, facts, talks):
    """A patched stand-in, its encoder and words; hidden states are of so many facts and talks."""
    monkeypatch.setattr(example("hidden"), "FACTS", facts)
    monkeypatch.setattr(example("hidden"), "TALKS", talks)
    model = patch_model(stand_in(tokenizer), CONFIGS[strategy], backend="reference")
    encoder = example("pool").Encoder(tokenizer, CONFIGS[strategy])
    return model, encoder, example("facts").Words.of(tokenizer)


@pytest.mark.parametrize("strategy", CONFIGS)
def test_the_start_writes_values_reads_facts_and_shuts_out_the_rest(strategy, tokenizer, monkeypatch):
    """On a stand-in of random weights: each part of the start does what it is there for, on states of its own."""
    start, hidden = example("start"), example("hidden")
    model, encoder, words = to_start(strategy, tokenizer, monkeypatch, 240, 8)
    start.structured_start(model, encoder, words)
    seen = hidden.hidden_states(model, encoder, words, Random("start 0"))[0]
    memory = model.model.layers[1].self_attn.delta_memory
    writing, answering = torch.stack(seen.writing), torch.stack(seen.answering)
    written, read = torch.cat(seen.written), torch.cat(seen.read)

    def gates(states):
        return torch.sigmoid(states @ memory.beta_proj.T + memory.beta_bias).mean()

    def directions(states, projection):
        heads = torch.tanh(states @ projection.T).unflatten(-1, (-1, 4))
        return torch.nn.functional.normalize(heads, dim=-1)

    with torch.no_grad():
        assert gates(writing) > 0.6 and gates(written) < 0.4
        keys = directions(writing, memory.memory_k_proj)[seen.pairs]
        queries = directions(answering, memory.memory_q_proj)
        agreed = torch.einsum("nhi,mhi->nm", keys, queries)
        own = agreed.diagonal().mean()
        other = (agreed.sum() - agreed.diagonal().sum()) / (agreed.numel() - len(agreed))
        assert own > other + 0.1
        # What neither states nor answers keeps to directions of its own.
        assert directions(written, memory.memory_k_proj)[..., 0].mean() > keys[..., 0].mean() + 0.1
        # A stand-in that predicts nothing hardly differs where an answer comes next.
        assert directions(read, memory.memory_q_proj)[..., 1].mean() > queries[..., 1].mean() + 0.1
        assert not memory.memory_k_proj.unflatten(0, (-1, 4))[:, 1].any()
        assert not memory.memory_q_proj.unflatten(0, (-1, 4))[:, 0].any()
        passed_on = writing @ memory.memory_v_proj.T @ memory.delta_o_proj.T
        rows = model.lm_head.weight - model.lm_head.weight.mean(0)
        logits = passed_on @ (rows * model.model.norm.weight).T
        values = torch.tensor(seen.values)
        wanted = logits.gather(1, values[:, None])
        assert (wanted - logits.mean(1, keepdim=True)).mean() > 3 * logits.std() / 4


def test_gradients_are_what_adding_to_an_attentions_output_does_to_the_logits(tokenizer):
    hidden = example("hidden")
    model = patch_model(stand_in(tokenizer, torch.float64), CONFIGS["msw"], backend="reference")
    attentions = [layer.self_attn for layer in model.model.layers[1:]]
    layers = [hidden.Seen() for _ in attentions]
    ids, places = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]]), torch.tensor([[0, 1], [1, 2]])
    hidden._add_gradients(model, attentions, layers, ids, places)
    assert [seen.answers for seen in layers] == [[7, 12]] * 2
    change = torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def logit(factor, layer):
        def add(module, arguments, output):
            output[0][0, 1] += factor * change
            return output

        hook = layer.register_forward_hook(add)
        with torch.no_grad(), memory_disabled(model):
            found = model(ids).logits[0, 1]
        hook.remove()
        return found[7] - found.mean()

    for seen, attention in zip(layers, attentions):
        found = (logit(1e-4, attention) - logit(-1e-4, attention)) / 2e-4
        torch.testing.assert_close(seen.gradients[0].double() @ change, found, rtol=1e-4, atol=1e-6)


def test_a_frozen_models_response_is_found_from_gradients():
    """Where the layers above answer linearly, the directions of all tokens are theirs, of those not seen, too."""
    start, hidden = example("start"), example("hidden")
    torch.manual_seed(0)
    rows, above = torch.randn(400, 16).double(), torch.randn(16, 16).double()
    tokens = list(range(300))
    seen = hidden.Seen(answers=tokens, gradients=list((rows @ above)[tokens].float()))
    found, gain = start.response_of(seen, rows)
    agreed = torch.cosine_similarity(rows[300:] @ found, rows[300:] @ above)
    assert agreed.min() > 0.9 and gain == pytest.approx((rows @ above).norm(dim=1).mean(), rel=0.1)


@pytest.mark.parametrize("strategy", CONFIGS)
def test_figures_of_the_start_are_of_statements_that_it_was_not_fitted_to(strategy, tokenizer, monkeypatch):
    figures, hidden = example("figures"), example("hidden")
    model, encoder, words = to_start(strategy, tokenizer, monkeypatch, 120, 4)
    layers = hidden.hidden_states(model, encoder, words, Random(0))
    for seen, fitted, others in zip(layers, *figures.parts(layers)):
        for name in ("writing", "values", "answering", "answers", "gradients"):
            whole = [*getattr(fitted, name), *getattr(others, name)]
            assert sorted(map(id, whole)) == sorted(map(id, getattr(seen, name))), name
        assert len(fitted.writing) > 2 * len(others.writing) and len(fitted.pairs) > 2 * len(others.pairs)
        pairs = [fitted.writing[i] for i in fitted.pairs] + [others.writing[i] for i in others.pairs]
        assert all(a is seen.writing[i] for a, i in zip(pairs, seen.pairs, strict=True))
    lines = figures.table(model, layers)
    heads = CONFIGS[strategy].num_state_heads
    assert [line.split()[0] for line in lines] == ["layer", "1", "2", str(4 * heads), str(8 * heads)]
    assert all(len(re.findall(r"-?\d\.\d\d", line)) == 4 for line in lines[1:3])


def test_text_is_compared_with_what_the_frozen_model_makes_of_it(tokenizer):
    """KL is 0 behind an empty memory that only reads, is more behind a full one, and the frozen model runs once."""
    pool, train = example("pool"), example("train")
    model = patch_model(stand_in(tokenizer), CONFIGS["msw"], backend="reference")
    prepare_for_training(model)
    torch.manual_seed(0)
    with torch.no_grad():
        for layer in model.model.layers[1:]:
            layer.self_attn.delta_memory.delta_o_proj.normal_()
    kept = train.Kept()
    trainee = train.Trainee(model, CONFIGS["msw"], kept)
    texts = pool.Pool(pool.Encoder(tokenizer, CONFIGS["msw"]), 4, 0).texts(1, 2)
    empty = MemoryState.zeros(model, 2)
    assert trainee.text(texts, empty.read_only(), Random(0))[0].item() == pytest.approx(0, abs=1e-6)
    assert set(kept.frozen) == set(kept.lower) == {tuple(text.ids) for text in texts}
    with pytest.MonkeyPatch.context() as patch:  # what the frozen model makes of them is not computed again
        patch.setattr(example("trainee"), "memory_disabled", None)
        assert trainee.text(texts, empty.read_only(), Random(0))[0].item() == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        for _, state in empty.items():
            state.normal_()
    assert trainee.text(texts, empty.read_only(), Random(0))[0].item() > 1e-3


@pytest.mark.parametrize("strategy", CONFIGS)
def test_overlap_is_what_keys_share_of_each_other_and_have_of_the_null_directions(strategy, tokenizer):
    pool, episodes, train = (example(name) for name in ("pool", "episodes", "train"))
    model = patch_model(stand_in(tokenizer), CONFIGS[strategy], backend="reference")
    prepare_for_training(model)
    encoder = pool.Encoder(tokenizer, CONFIGS[strategy])
    said = ("I live in Oslo. Ben has a cat.", "It rains.")
    told = [encoder.told([episodes.message("user", text)]) for text in said]
    trainee = train.Trainee(model, CONFIGS[strategy])
    found = trainee.tell([[row] for row in told], MemoryState.zeros(model, 2))
    segments = [None if row.segments is None else torch.tensor([row.segments]) for row in told]
    with capture_projections() as captured, torch.no_grad():
        for row, segment_ids in zip(told, segments):
            memory, named = MemoryState.zeros(model), {} if segment_ids is None else {"segment_ids": segment_ids}
            model.model(torch.tensor([row.ids]), memory=memory, use_cache=False, **named)
    each = []
    for index, layer in identity_of(model).memories.items():
        writes = [writes_of(layer, of_row[index], segment_ids) for of_row, segment_ids in zip(captured, segments)]
        keys, gates = (torch.cat([getattr(of_row, name)[0] for of_row in writes]) for name in ("keys", "gates"))
        weights = gates.mean(-1).square()
        products = torch.einsum("shi,thi->sth", keys[..., 2:], keys[..., 2:]).square()
        pairs, null = torch.einsum("sh,th->sth", weights, weights), keys[..., :2].square().sum(-1)
        each.append((products * pairs).sum((0, 1)) / pairs.sum((0, 1)) + (null * weights).sum(0) / weights.sum(0))
    torch.testing.assert_close(found, torch.stack(each).mean(), rtol=1e-3, atol=0)  # float16 outputs are kept
    found.backward()
    memory = model.model.layers[1].self_attn.delta_memory
    assert memory.memory_k_proj.grad.abs().max() > 0
    assert not memory.memory_v_proj.grad.any() and not memory.beta_proj.grad.any()


def test_noise_is_what_queries_have_beside_the_null_direction(tokenizer):
    pool, train = example("pool"), example("train")
    model = patch_model(stand_in(tokenizer), CONFIGS["msw"], backend="reference")
    prepare_for_training(model)
    texts = pool.Pool(pool.Encoder(tokenizer, CONFIGS["msw"]), 4, 0).texts(1, 2)
    noise = train.Trainee(model, CONFIGS["msw"]).text(texts, MemoryState.zeros(model, 2), Random(0)).noise
    each = []
    with capture_projections() as captured, torch.no_grad():
        for text in texts:
            model.model(torch.tensor([text.ids]), memory=MemoryState.zeros(model), use_cache=False)
    for index, layer in identity_of(model).memories.items():
        raw = torch.cat([of_row[index][0, :, : layer.rule.read_width] for of_row in captured])
        queries = torch.nn.functional.normalize(torch.tanh(raw).unflatten(-1, (-1, 4)), dim=-1)
        each.append(queries[..., [0, 2, 3]].square().sum(-1).mean())
    torch.testing.assert_close(noise, torch.stack(each).mean(), rtol=1e-3, atol=0)  # float16 outputs are kept
    noise.backward()
    memory = model.model.layers[1].self_attn.delta_memory
    assert memory.memory_q_proj.grad.any() and not memory.memory_k_proj.grad.any()


@pytest.mark.parametrize("strategy", ["msw", "ssw"])
def test_what_text_erases_is_its_gates_times_what_its_keys_have_beside_the_null_direction(strategy, tokenizer):
    pool, train = example("pool"), example("train")
    model = patch_model(stand_in(tokenizer), CONFIGS[strategy], backend="reference")
    prepare_for_training(model)
    texts = pool.Pool(pool.Encoder(tokenizer, CONFIGS[strategy]), 4, 0).texts(1, 3)
    # Padding erases nothing.
    texts[1] = pool.Told(texts[1].ids[:50], None if texts[1].segments is None else texts[1].segments[:50])
    found = train.Trainee(model, CONFIGS[strategy]).text(texts, MemoryState.zeros(model, 3), Random(0)).erased
    sums, tokens = [], sum(len(text.ids) for text in texts)
    for text in texts:
        named = {} if text.segments is None else {"segment_ids": torch.tensor([text.segments])}
        with capture_projections() as captured, torch.no_grad():
            model.model(torch.tensor([text.ids]), memory=MemoryState.zeros(model), use_cache=False, **named)
        for index, layer in identity_of(model).memories.items():
            writes = writes_of(layer, captured[0][index], named.get("segment_ids"))
            sums.append((writes.gates.mean(-1) * writes.keys[..., 1:].square().sum(-1)).mean(-1).sum())
    whole = torch.stack(sums).sum() / tokens / len(identity_of(model).memories)
    torch.testing.assert_close(found, whole, rtol=1e-3, atol=0)  # float16 outputs are kept
    found.backward()
    memory = model.model.layers[1].self_attn.delta_memory
    assert memory.memory_k_proj.grad.any() and memory.beta_proj.grad.any()
    assert not memory.memory_q_proj.grad.any() and not memory.memory_v_proj.grad.any()


def test_without_any_word_values_are_of_the_relations_own_lists(tokenizer):
    facts, pool = example("facts"), example("pool")
    encoder = pool.Encoder(tokenizer, CONFIGS["ssw"])
    lists = {value for relation in facts.RELATIONS for value in facts.part(relation.values, held_out=False)}

    def strange(any_word: bool) -> int:
        drawn = pool.Pool(encoder, 20, 0, any_word=any_word)
        told = [drawn.episode(2, place, False)[0][0].ids for place in range(drawn.size)]
        return sum(not any(value in encoder.tokenizer.decode(ids) for value in lists) for ids in told)

    assert strange(False) == 0 < strange(True)
    assert {name for name, found in example("__main__").ANY_WORD.items() if not found} == {"ssw"}


def test_quietened_queries_are_short_beside_their_null_direction(tokenizer):
    start = example("start")
    model = patch_model(stand_in(tokenizer), CONFIGS["msw"], backend="reference")
    start.clear_nulls(model)
    rows = model.model.layers[1].self_attn.delta_memory.memory_q_proj.unflatten(0, (-1, 4))
    with torch.no_grad():
        rows[0] *= 0.1 / rows[0].norm(dim=-1, keepdim=True).clamp(min=1e-9)
    before = rows.detach().clone()
    start.quieten(model)
    assert torch.equal(rows[:, :2], before[:, :2]) and torch.equal(rows[0], before[0])  # short enough
    torch.testing.assert_close(rows[1:, 2:].norm(dim=-1), torch.full_like(rows[1:, 2:, 0], start.QUIET))
    assert torch.cosine_similarity(rows, before, dim=-1)[:, 1:].min() > 0.9999


def test_what_is_minimized_has_all_parts_with_their_weights():
    train = example("train")
    weights = {"divergence_weight": 10.0, "overlap_weight": 3.0, "noise_weight": 5.0, "erased_weight": 2.0}
    options = train.TrainOptions(**weights, quiet_from=7)
    one = torch.tensor(1.0)
    assert train.StepLosses(one, one, 2 * one, None).total(8, options) == 7
    settled = train.StepLosses(one, one, 2 * one, train.TextLosses(4 * one, 8 * one, 16 * one))
    assert settled.total(6, options) == 47 and settled.total(7, options) == 119


@pytest.mark.parametrize("strategy", CONFIGS)
def test_losses_of_a_bfloat16_model_are_float32_and_train_float32_weights(strategy, tokenizer):
    """As on a GPU; facts in two contexts."""
    pool, train = example("pool"), example("train")
    model = patch_model(stand_in(tokenizer, torch.bfloat16), CONFIGS[strategy], backend="reference")
    prepare_for_training(model)
    drawn = pool.Pool(pool.Encoder(tokenizer, CONFIGS[strategy]), 8, 0)
    losses = train.step_losses(train.Trainee(model, CONFIGS[strategy]), drawn, 3, 1, short(train))
    parts = losses.answer, losses.overlap, *losses.text
    assert all(part.dtype == torch.float32 and part.isfinite() for part in parts)
    losses.total(3, short(train)).backward()
    memory = model.model.layers[1].self_attn.delta_memory
    for name in ("memory_q_proj", "memory_k_proj"):
        weight = getattr(memory, name)
        assert weight.dtype == torch.float32 and weight.grad.isfinite().all() and weight.grad.any()


def test_facts_are_told_in_as_many_contexts_as_asked(tokenizer):
    episodes, pool = example("episodes"), example("pool")
    for contexts in (1, 2, 4):
        found = episodes.draw_episode(Random(3), 4, contexts=contexts, talks=0.0, updates=0.0)
        assert len(found.contexts) == contexts and all(found.contexts)
        assert found.told == [message for context in found.contexts for message in context]
    drawn = pool.Pool(pool.Encoder(tokenizer, CONFIGS["msw"]), 12, 0)
    for step in range(6):
        rows = drawn.step(step, 4, False)
        assert {len(told) for told, _ in rows} == {pool.CONTEXTS[4][step // 2]}
