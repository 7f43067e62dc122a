"""Several sequences packed into a row: each gets a memory of its own, however the row says where they begin."""

import pytest
import torch
from support import loud_adapter, relative_error, tiny_model
from transformers import DynamicCache

from deltamem_fast import MemoryState, patch_model
from deltamem_fast.model.sequences import sequence_starts

LENGTHS = [[7, 13], [4, 9, 7]]  # of the sequences in two rows
IDS = torch.randint(3, 128, (2, 20), generator=torch.Generator().manual_seed(3))
POSITIONS = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in LENGTHS])
OWNERS = torch.stack([torch.cat([torch.full((n,), i) for i, n in enumerate(row)]) for row in LENGTHS])
BLOCKS = (OWNERS[:, None, :, None] == OWNERS[:, None, None, :]) & torch.ones(20, 20, dtype=torch.bool).tril()


def parts():
    """(row, start, end) of each sequence."""
    for row, lengths in enumerate(LENGTHS):
        ends = torch.tensor(lengths).cumsum(0).tolist()
        for start, end in zip([0, *ends], ends):
            yield row, start, end


WAYS = {
    "positions": {"position_ids": POSITIONS},
    "positions and mask": {"position_ids": POSITIONS, "attention_mask": torch.ones_like(IDS)},
    "boolean blocks": {"position_ids": POSITIONS, "attention_mask": BLOCKS, "token_mask": True},
    "added blocks": {
        "position_ids": POSITIONS,
        "attention_mask": torch.where(BLOCKS, 0.0, torch.finfo(torch.float32).min),
        "token_mask": torch.ones_like(IDS),
    },
    "blocks alone": {"attention_mask": BLOCKS, "token_mask": True},
    "numbers": {"seq_idx": OWNERS, "attention_mask": BLOCKS, "token_mask": True},
}
# A 2-D mask lets SDPA attend over the borders; the memory keeps to them all the same.
ISOLATED = [way for way in WAYS if way != "positions and mask"]


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("way", ISOLATED)
def test_no_sequence_reads_another(way, train):
    model = loud_adapter(patch_model(tiny_model()))
    memory = MemoryState.zeros(model, 5)
    with torch.set_grad_enabled(train):
        packed = model(IDS, memory=memory, use_cache=False, **WAYS[way]).logits
    for n, (row, start, end) in enumerate(parts()):
        alone = MemoryState.zeros(model, 1)
        with torch.no_grad():
            wanted = model(IDS[row : row + 1, start:end], memory=alone, use_cache=False).logits
        assert relative_error(packed[row : row + 1, start:end], wanted) < 1e-4
        assert all(relative_error(memory[i][n : n + 1], alone[i]) < 1e-4 for i in alone)


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
def test_a_mask_that_numbers_the_sequences(train):
    numbers = OWNERS + 1
    numbers[0, :3] = numbers[1, 18:] = 0  # padding
    model = loud_adapter(patch_model(tiny_model(num_hidden_layers=1)))
    memory = MemoryState.zeros(model, 5)
    with torch.set_grad_enabled(train):
        model(IDS, attention_mask=numbers, memory=memory, use_cache=False)
    for n, (row, start, end) in enumerate(parts()):
        alone, real = MemoryState.zeros(model, 1), numbers[row : row + 1, start:end] != 0
        with torch.no_grad():
            model(IDS[row : row + 1, start:end], attention_mask=real, memory=alone, use_cache=False)
        assert relative_error(memory[0][n : n + 1], alone[0]) < 1e-4
    with pytest.raises(ValueError, match="got a cache, but by attention_mask a row holds several"):
        model(IDS, attention_mask=numbers, past_key_values=DynamicCache(config=model.config))


@pytest.mark.parametrize("real", [True, torch.ones(2, 8, dtype=torch.bool)])
def test_a_mask_of_zeros_and_ones_numbers_nothing(real):
    """Nor where token_mask has the memory read what attention does not see."""
    model = loud_adapter(patch_model(tiny_model(num_hidden_layers=1)))
    mask = torch.tensor([[1, 1, 1, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1, 1]])
    ids, memories = IDS[:, :8], [MemoryState.zeros(model, 2) for _ in range(2)]
    with torch.no_grad():
        found, wanted = (
            model(ids, attention_mask=m, token_mask=real, memory=memory).logits
            for m, memory in zip((mask, mask.bool()), memories)
        )
    assert torch.equal(found, wanted) and torch.equal(memories[0][0], memories[1][0])


@pytest.mark.parametrize("family", ["llama", "smollm3"])
def test_without_a_memory_of_the_callers(family):
    model = loud_adapter(patch_model(tiny_model(family)))
    with torch.no_grad():
        packed = model(IDS, position_ids=POSITIONS, use_cache=False).logits
        for row, start, end in parts():
            wanted = model(IDS[row : row + 1, start:end], use_cache=False).logits
            assert relative_error(packed[row : row + 1, start:end], wanted) < 1e-4


def test_padding_is_no_border():
    mask = torch.ones_like(IDS)
    mask[0, :6], mask[1, 15:], mask[1, 4:6] = 0, 0, 0
    counted = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    for positions in (counted, torch.arange(20).expand(2, -1), torch.arange(20)[None]):
        for cache in (None, object()):
            assert sequence_starts({"position_ids": positions}, cache, mask != 0, 2, 20) is None
    blocks = ((mask != 0)[:, None, None, :] & torch.ones(20, 20, dtype=torch.bool).tril()).clone()
    assert sequence_starts({"attention_mask": blocks}, None, mask != 0, 2, 20) is None
    restarting = counted.clone()
    restarting[0, 10:] -= counted[0, 10]
    starts = sequence_starts({"position_ids": restarting}, None, mask != 0, 2, 20)
    assert starts.tolist() == [0, 10, 20, 40]
    for zeros_and_ones in (mask, mask.float(), mask.bool()):
        assert sequence_starts({"attention_mask": zeros_and_ones}, None, mask != 0, 2, 20) is None


def test_what_is_far_is_not_hidden_by_another_sequence():
    distance = (torch.arange(20)[:, None] - torch.arange(20)).float()
    bias = torch.where(distance >= 0, -0.5 * distance, torch.finfo(torch.float32).min)
    chunks = (distance >= 0) & (torch.arange(20)[:, None] // 4 == torch.arange(20) // 4)
    full = distance >= 0
    for mask in (
        bias[None, None],
        torch.zeros(1, 1, 1, 20),
        {"full_attention": full[None, None], "chunked_attention": chunks[None, None]},
        {"sliding_attention": chunks[None, None]},
    ):
        assert sequence_starts({"attention_mask": mask}, None, None, 2, 20) is None


def test_positions_of_text_before_those_of_images():
    starts = sequence_starts({"position_ids": POSITIONS.expand(4, -1, -1)}, None, None, 2, 20)
    assert starts.tolist() == [0, 7, 20, 24, 33, 40]


def test_a_second_turn_in_a_window():
    from transformers import StaticCache

    model = loud_adapter(patch_model(tiny_model("mistral", sliding_window=8)))
    cache = StaticCache(config=model.config, max_cache_len=64)
    first = model.generate(IDS[:1, :10], past_key_values=cache, max_new_tokens=3, do_sample=False)
    longer = torch.cat([first, IDS[:1, 10:15]], 1)
    assert model.generate(longer, past_key_values=cache, max_new_tokens=3, do_sample=False).shape == (1, 21)


def test_flex_attentions_mask_is_looked_into():
    flex = pytest.importorskip("torch.nn.attention.flex_attention")

    def rule(b, h, q, k):
        return (OWNERS[b, q] == OWNERS[b, k]) & (q >= k)

    mask = flex.create_block_mask(rule, 2, None, 20, 20, device="cpu", BLOCK_SIZE=4)
    assert sequence_starts({"attention_mask": mask}, None, None, 2, 20).tolist() == [0, 7, 20, 24, 33, 40]


def test_with_a_cache_or_too_few_rows_it_is_refused():
    model = loud_adapter(patch_model(tiny_model()))
    with pytest.raises(ValueError, match="past_key_values: got a cache, but by position_ids a row holds several"):
        model(IDS, position_ids=POSITIONS, past_key_values=DynamicCache(config=model.config))
    with pytest.raises(ValueError, match=r"memory: got 2 row\(s\), allowed 5: one for each packed sequence"):
        model(IDS, position_ids=POSITIONS, memory=MemoryState.zeros(model, 2))


@pytest.mark.parametrize(
    ("starts", "kind", "message"),
    [
        ([0, 5, 12], TypeError, "got list, allowed an int32 or int64 tensor"),
        (torch.tensor([0.0, 12.0]), TypeError, "got torch.float32"),
        (torch.tensor([]).int(), ValueError, r"got shape \[0\]"),
        (torch.tensor([0, 5, 11]), ValueError, r"got \[0, 5, 11\], allowed a non-decreasing list from 0 to T = 12"),
        (torch.tensor([0, 7, 5, 12]), ValueError, r"got \[0, 7, 5, 12\]"),
    ],
)
def test_mistaken_starts_leave_the_memory_as_it_is(starts, kind, message):
    model = patch_model(tiny_model())
    memory = MemoryState.zeros(model, max(0, len(starts) - 1))
    with pytest.raises(kind, match=f"cu_seq_lens_q: {message}"):
        model(torch.ones(1, 12, dtype=torch.int64), cu_seq_lens_q=starts, use_cache=False, memory=memory)
    memory.check_whole()


def test_compiled_forwards_say_so():
    torch._dynamo.reset()  # models compiled before it count against its limit
    model = loud_adapter(patch_model(tiny_model(num_hidden_layers=1)))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        compiled(IDS, position_ids=torch.arange(20)[None], use_cache=False)
        with pytest.raises(RuntimeError, match="compiled forwards need cu_seq_lens_q"):
            compiled(IDS, position_ids=POSITIONS, use_cache=False)
