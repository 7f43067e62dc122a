"""A text's trace against the forward that it was taken from."""

import json
import math
import types

import pytest
import torch
from inspection_support import CHAT, CONFIGS, TOKENIZER, bits, filled, model_with, random_trace
from matplotlib.image import imread
from support import loud_adapter, tiny_model
from tokenizers import Tokenizer, decoders, models
from tokenizers_for_tests import chatml_tokenizer, tokenizer_with
from transformers import PreTrainedTokenizerFast

from deltamem_fast import (
    DeltaMemConfig,
    MemoryState,
    memory_disabled,
    patch_model,
    segment_ids_from_messages,
    unpatch_model,
)
from deltamem_fast.inspection import pictures
from deltamem_fast.inspection import trace as module
from deltamem_fast.inspection.pictures import draw_trace, trace_png_size
from deltamem_fast.inspection.trace import MEASURES, token_pieces, trace
from deltamem_fast.model import update as advance
from deltamem_fast.recall.weights import find_weights, load_backbone
from deltamem_fast.text.encode import encode_text


@pytest.fixture
def reads_of_the_forward(monkeypatch):
    """By layer, in the order they run, what the backend gave as reads: [T, H·r]."""
    seen, operations = [], advance.operations

    def noted(call):
        def run(*arguments, **options):
            out = call(*arguments, **options)
            if call.__name__ == "read":
                seen.append(out[0])
            elif options.get("mask") is None:
                seen.append(out.reads[0])
            return out

        return run

    def watched(backend, device):
        ops = operations(backend, device)
        return types.SimpleNamespace(scan=noted(ops.scan), read=noted(ops.read), step=ops.step)

    monkeypatch.setattr(advance, "operations", watched)
    return seen


@pytest.mark.parametrize("start", ["empty", "filled", "frozen"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_trace_is_what_the_forward_read_and_wrote(name, start, reads_of_the_forward):
    config = CONFIGS[name]
    model = model_with(config)
    memory = None if start == "empty" else filled(model)
    if start == "frozen":
        memory.frozen = True
    before = None if memory is None else bits(memory)
    found = trace(model, TOKENIZER, CHAT, memory)
    assert memory is None or (bits(memory) == before and found.memory is not memory)

    ids, segments = segment_ids_from_messages(TOKENIZER, CHAT, "sentence" if "message" != name else "message")
    assert found.token_ids == tuple(ids[0].tolist())
    assert found.segment_ids == (tuple(segments[0].tolist()) if config.segmented else None)
    assert found.layers == tuple(found.memory) and found.frozen == (start == "frozen")
    assert found.writes.shape == (len(found), len(found.layers), config.num_state_heads) == found.norms.shape
    for n, layer in enumerate(found.layers):
        torch.testing.assert_close(found.final[n], found.memory[layer][0], atol=1e-5, rtol=1e-5)
        reads = reads_of_the_forward[n].unflatten(-1, (config.num_state_heads, config.rank)).norm(dim=-1)
        torch.testing.assert_close(found.reads[:, n], reads, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.states[-1, n], found.final[n])
        assert torch.equal(found.initial[n], torch.zeros_like(found.final[n]) if memory is None else memory[layer][0])
    # And that forward is the one that a caller would have made.
    mine = MemoryState.zeros(model) if memory is None else memory.clone()
    given = {"segment_ids": segments} if config.segmented else {}
    with torch.no_grad():
        model(ids, memory=mine, use_cache=False, **given)
    assert bits(mine) == bits(found.memory)
    assert (found.writes > 0).any() != found.frozen and (found.beta > 0).any() != found.frozen


@pytest.mark.parametrize("name", ["msw", "ssw"])
def test_a_bfloat16_model_is_traced_from_its_own_projections(name):
    model = model_with(CONFIGS[name], dtype=torch.bfloat16)
    found = trace(model, TOKENIZER, CHAT)
    for n, layer in enumerate(found.layers):
        torch.testing.assert_close(found.final[n], found.memory[layer][0], atol=1e-5, rtol=1e-5)
    assert found.writes.dtype == found.states.dtype == torch.float32


def test_the_next_text_goes_on_from_what_the_first_one_left():
    model = model_with(CONFIGS["tsw"])
    first = trace(model, TOKENIZER, "My dog is called Rex.")
    second = trace(model, TOKENIZER, "Where did Ada go?", first.memory)
    assert torch.equal(second.initial, torch.cat([state for _, state in first.memory.items()]))
    assert second.reads[0].norm() > 0 == first.reads[0].norm()


# --- texts and their tokens


def test_a_string_is_a_user_message_where_there_is_a_chat_template():
    tsw, sentence, message = CONFIGS["tsw"], CONFIGS["ssw"], CONFIGS["message"]
    text = "She went home. It was shut; he said so."
    chat = [{"role": "user", "content": text}]
    for config in (tsw, sentence, message):
        ids, segments = encode_text(TOKENIZER, text, config)
        expected = encode_text(TOKENIZER, chat, config)
        assert torch.equal(ids, expected[0]) and ids.dtype == torch.int64
        assert ids[0].tolist() == TOKENIZER.apply_chat_template(chat, tokenize=True, return_dict=False)
        assert (segments is None) == (config is tsw)
    assert encode_text(TOKENIZER, text, sentence)[1].unique().tolist() == [0, 1, 2]
    assert encode_text(TOKENIZER, text, message)[1].unique().tolist() == [0]

    bare = chatml_tokenizer()
    bare.chat_template = None
    plain = TOKENIZER(text)["input_ids"]
    for config, owners in ((tsw, None), (sentence, [0, 1, 2]), (message, [0])):
        ids, segments = encode_text(bare, text, config)
        assert ids[0].tolist() == plain
        assert segments is None if owners is None else segments.unique().tolist() == owners
    ids, segments = encode_text(bare, text, sentence)
    assert bare.decode(ids[0][segments[0] == 1]).strip() == "It was shut;"
    with pytest.raises(ValueError, match="tokenizer: has no chat template"):
        encode_text(bare, chat, tsw)
    for wrong in (3, b"bytes", chat[0]):
        with pytest.raises(ValueError, match="text: got (int|bytes|dict), allowed a string or a list"):
            encode_text(TOKENIZER, wrong, tsw)


def test_pieces_of_a_byte_level_vocabulary():
    text = "The dog\n\twent <|im_end|>日é"
    ids = TOKENIZER(text)["input_ids"]
    pieces = token_pieces(TOKENIZER, ids)
    assert "<|im_end|>" in pieces and any(piece.startswith(" ") for piece in pieces) and "" not in pieces
    assert "".join(pieces[:4]) == TOKENIZER.decode(ids[:4])
    assert pieces[-5:] == ["⟨E6⟩", "⟨97⟩", "⟨A5⟩", "⟨C3⟩", "⟨A9⟩"]


def test_pieces_of_a_vocabulary_with_spaces_in_the_names_and_bytes():
    vocabulary = {"<unk>": 0, "▁Hello": 1, "▁": 2, "wor": 3, "<0xE2>": 4, "<0x0A>": 5, "<0x41>": 6, "<s>": 7}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    inner.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1),
    ])  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>")
    assert token_pieces(tokenizer, [7, 1, 2, 3, 4, 5, 6]) == ["<s>", " Hello", " ", "wor", "⟨E2⟩", "\n", "A"]


# --- what is told of it


def test_totals_top_and_json():
    model = model_with(CONFIGS["msw"])
    found = trace(model, TOKENIZER, CHAT, filled(model))
    writes = found.total("writes")
    torch.testing.assert_close(writes, found.writes.flatten(1).norm(dim=1))
    torch.testing.assert_close(found.total("beta"), found.beta.flatten(1).mean(1))
    entries = found.top("writes", 3)
    assert [entry.size for entry in entries] == sorted(writes.tolist(), reverse=True)[:3]
    assert all(found.tokens[entry.positions[0]] == entry.text and len(entry.positions) == 1 for entry in entries)
    assert len(found.top("reads", 10**6)) == len(found)
    with pytest.raises(ValueError, match="measure: got 'beta', allowed writes, reads"):
        found.top("beta")
    told = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert told["layers"] == [0, 1, 2] and len(told["tokens"]) == len(found) and not told["frozen"]
    token = told["tokens"][5]
    assert token["write"] == pytest.approx(writes[5].item()) and token["segment"] is None
    assert token["writes"][2][1] == pytest.approx(found.writes[5, 2, 1].item()) and token["id"] == found.token_ids[5]
    lines = str(found).splitlines()
    assert len(lines) == len(found) + 1 and lines[0].split()[:3] == ["token", "write", "read"]
    assert all(line.isprintable() for line in lines)


def test_with_segments_a_segment_wrote():
    model = model_with(CONFIGS["ssw"])
    found = trace(model, TOKENIZER, CHAT)
    entries = found.top("writes")
    assert len(entries) == len(set(found.segment_ids) - {-1}) == 4
    assert any("Paris!" in entry.text and len(entry.positions) > 3 for entry in entries)
    for entry in entries:
        assert {found.total("writes")[i].item() for i in entry.positions} == {entry.size}
    (most,) = trace(model, TOKENIZER, CHAT, filled(model)).top("reads", 1)
    assert len(most.positions) == 1
    assert str(found).splitlines()[1].split()[:2] == ["0", "0"]
    frozen = filled(model)
    frozen.frozen = True
    assert trace(model, TOKENIZER, CHAT, frozen).top("writes") == []


def test_states_are_kept_of_short_texts_and_small_memories(monkeypatch):
    model = model_with(CONFIGS["tsw"])
    text = "The dog. " * 3
    length = len(trace(model, TOKENIZER, text))
    for name, limit in (("KEPT_TOKENS", length), ("KEPT_NUMBERS", length * 3 * 64)):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, limit)
            assert trace(model, TOKENIZER, text).states.shape == (length, 3, 1, 8, 8)
            patch.setattr(module, name, limit - 1)
            assert trace(model, TOKENIZER, text).states is None


def test_what_cannot_be_traced(monkeypatch):
    model = model_with(CONFIGS["tsw"])
    with pytest.raises(ValueError, match="memory: got 2 rows, allowed 1"):
        trace(model, TOKENIZER, "a", MemoryState.zeros(model, 2))
    with memory_disabled(model), pytest.raises(ValueError, match="model: its memory is switched off"):
        trace(model, TOKENIZER, "a")
    other = filled(loud_adapter(patch_model(tiny_model(vocab_size=len(TOKENIZER)), DeltaMemConfig.tsw()), seed=9))
    with pytest.raises(ValueError, match="memory: made under adapter"):
        trace(model, TOKENIZER, "a", other)
    empty = tokenizer_with("")
    with pytest.raises(ValueError, match="text: got '', which has no token"):
        trace(model, empty, "")
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        with pytest.raises(ValueError, match="model: nothing was seen of its forward, which is compiled"):
            trace(model, TOKENIZER, "a")
    unpatch_model(model)
    with pytest.raises(ValueError, match="is not patched; call patch_model first"):
        trace(model, TOKENIZER, "a")


# --- pictures


@pytest.mark.parametrize(
    ("name", "text"), [("msw", "It costs $5 and $6^$ \\frac 日本."), ("tsw", "The dog went. " * 60)]
)
def test_the_picture_of_a_trace(tmp_path, name, text, recwarn):
    model = model_with(CONFIGS[name])
    found = trace(model, TOKENIZER, text)
    first = imread(draw_trace(found, tmp_path / "a" / "trace.png"))
    assert first.shape[1::-1] == trace_png_size(found)
    other = imread(draw_trace(trace(model, TOKENIZER, text, filled(model)), tmp_path / "other.png"))
    assert (first != other).any() and first.std() > 0.01
    assert not [w for w in recwarn if "Glyph" in str(w.message)]


def test_no_matplotlib_no_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "installed", lambda package: False)
    with pytest.raises(ImportError, match="matplotlib is not installed"):
        draw_trace(random_trace()[0], tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


# --- the shipped weights


@pytest.mark.parametrize("strategy", ["tsw", "msw"])
def test_the_value_of_a_fact_is_what_is_written(strategy):
    """ "The code of Corpus is 42.": 42 has the widest write gate, and writes more than any other word."""
    weights = find_weights()
    model, tokenizer = load_backbone(weights.backbone)
    found = trace(patch_model(model, weights.adapters[strategy]), tokenizer, "The code of Corpus is 42.")
    assert [piece.strip() for piece in found.tokens[1:-2]] == ["The", "code", "of", "Cor", "pus", "is", "42"]
    writes, beta = found.total("writes"), found.total("beta")
    assert int(beta.argmax()) == 7 and beta[7] > 1.4 * beta.sort().values[-2]
    assert int(writes[1:8].argmax()) == 6 and writes[7] > 1.5 * writes[1:7].max()
    # Asked for it, the name reads more than the words of the question around it.
    asked = trace(model, tokenizer, "What is the code of Corpus?", found.memory)
    assert {"pus", " Cor"} & {entry.text for entry in asked.top("reads", 3)}
    assert math.isclose(found.memory.report().rows[0].norm, found.norms[-1, 0, 0].item(), rel_tol=1e-4)
    assert set(MEASURES) < found.to_dict()["tokens"][0].keys()
