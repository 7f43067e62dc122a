"""episode_loss against the same thing by hand, and what gets a gradient."""

import pytest
import torch
import torch.nn.functional as F
from support import loud_adapter, relative_error, tiny_model

from deltamem_fast import DeltaMemConfig, MemoryState, memory_disabled, patch_model
from deltamem_fast.training import EpisodeBatch, episode_loss
from deltamem_fast.training.run import enable_checkpointing

CONFIGS = {
    "tsw": DeltaMemConfig(),
    "ssw": DeltaMemConfig.ssw("sentence_mean"),
    "msw": DeltaMemConfig.msw(2, rank=4),
    "head gates": DeltaMemConfig(rankwise_gates=False, couple_lambda=False, delta_heads=("q", "k", "v", "o")),
}
LENGTHS = (7, 4, 0)  # of the write contexts; the last row has none


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    made = loud_adapter(patch_model(tiny_model(), CONFIGS[request.param], backend="reference"))
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and ".delta_memory." in name)
    return made


@pytest.fixture
def batch(model):
    segmented = model.model.layers[0].self_attn.delta_memory.config.segmented
    make = torch.Generator().manual_seed(5)
    write_ids = torch.randint(3, 128, (3, 7), generator=make)
    read_ids = torch.randint(3, 128, (3, 6), generator=make)
    write_mask = torch.arange(7) < torch.tensor(LENGTHS).unsqueeze(1)
    read_mask = torch.arange(6) < torch.tensor([6, 5, 6]).unsqueeze(1)
    labels = torch.where(read_mask, read_ids, -100)
    labels[0, :3] = labels[1, :2] = labels[2, :5] = -100
    segment_ids = torch.where(write_mask, torch.tensor([-1, 0, 0, 0, 1, 1, 2]), -1) if segmented else None
    return EpisodeBatch(write_ids, write_mask, read_ids, read_mask, labels, segment_ids)


def row_of(batch, row):
    """One row without its padding: write_ids, segment_ids, read_ids, labels, each [1, T]."""
    write, read = batch.write_mask[row], batch.read_mask[row]
    segments = None if batch.segment_ids is None else batch.segment_ids[row][write].unsqueeze(0)
    return (batch.write_ids[row][write].unsqueeze(0), segments,
            batch.read_ids[row][read].unsqueeze(0), batch.labels[row][read].unsqueeze(0))  # fmt: skip


def losses_by_hand(model, batch):
    """Summed cross-entropy of each row with the public API alone, a row at a time."""
    losses = []
    for row in range(3):
        write_ids, segments, read_ids, labels = row_of(batch, row)
        memory = MemoryState.zeros(model)
        if write_ids.numel():
            chosen = {} if segments is None else {"segment_ids": segments}
            model(write_ids, memory=memory, use_cache=False, **chosen)
        memory.frozen = True
        logits = model(read_ids, memory=memory, use_cache=False).logits
        losses.append(F.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-100, reduction="sum"))
    return torch.stack(losses)


def penalty_by_hand(model, batch, target):
    """mean over layers of (mean β − target)², from the hidden states that the attentions are given."""
    layers = [layer.self_attn for layer in model.model.layers]
    gates = [[] for _ in layers]

    def look(attention, args, kwargs):
        hidden = (kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])[0]
        if segments is not None:
            hidden = torch.stack([hidden[segments[0] == i].mean(0) for i in range(int(segments.max()) + 1)])
        memory = attention.delta_memory
        gates[attention.layer_idx].append(torch.sigmoid(F.linear(hidden, memory.beta_proj, memory.beta_bias)))

    hooks = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in layers]
    for row in range(3):
        write_ids, segments, _, _ = row_of(batch, row)
        if write_ids.numel():
            chosen = {} if segments is None else {"segment_ids": segments}
            model(write_ids, memory=MemoryState.zeros(model), use_cache=False, **chosen)
    for hook in hooks:
        hook.remove()
    return torch.stack([(torch.cat(found).mean() - target) ** 2 for found in gates]).mean()


def gradients(model, loss):
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad))
    return dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True)))


def test_loss_and_gradients_are_those_by_hand(model, batch):
    found = episode_loss(model, batch, gate_weight=0.3, gate_target=0.1)
    rows, penalty = losses_by_hand(model, batch), penalty_by_hand(model, batch, 0.1)
    tokens = torch.tensor([3, 3, 1])
    assert torch.equal(found.row_tokens, tokens)
    torch.testing.assert_close(found.row_losses, rows.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.answer_loss, rows.sum() / tokens.sum(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.penalty, penalty, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.loss, found.answer_loss + 0.3 * found.penalty)
    ours, theirs = gradients(model, found.loss), gradients(model, rows.sum() / tokens.sum() + 0.3 * penalty)
    for name, gradient in ours.items():
        assert gradient is not None and gradient.isfinite().all(), name
        assert gradient.abs().max() > 0, name
        assert relative_error(gradient, theirs[name]) < 1e-4, name


def test_only_the_adapter_gets_gradients(model, batch):
    episode_loss(model, batch).loss.backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    assert with_gradient == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert with_gradient and all(".delta_memory." in name for name in with_gradient)


def test_the_write_pass_is_differentiated(model, batch):
    """Without a gradient through the state the writing parameters would have none from the answers."""
    found = gradients(model, episode_loss(model, batch, gate_weight=0.0).answer_loss)
    for name, gradient in found.items():
        if name.endswith(("memory_k_proj", "memory_v_proj", "beta_proj", "beta_bias")):
            assert gradient.abs().max() > 0, name


def test_an_empty_memory_is_the_backbone_without_a_gradient(model, batch):
    empty = EpisodeBatch(
        batch.write_ids, torch.zeros_like(batch.write_mask), batch.read_ids, batch.read_mask, batch.labels,
        None if batch.segment_ids is None else torch.full_like(batch.segment_ids, -1),
    )  # fmt: skip
    found = episode_loss(model, empty, gate_weight=0.0)
    with memory_disabled(model), torch.no_grad():
        logits = model(batch.read_ids, attention_mask=batch.read_mask, use_cache=False).logits
    rows = F.cross_entropy(logits[:, :-1].transpose(1, 2), batch.labels[:, 1:], ignore_index=-100, reduction="none")
    torch.testing.assert_close(found.row_losses, rows.sum(1), rtol=1e-6, atol=1e-6)
    # On the graph all the same, as distributed training wants it.
    for name, gradient in gradients(model, found.loss).items():
        assert gradient is not None and gradient.abs().max() == 0, name


def test_several_read_parts_of_one_context_are_as_many_episodes(model, batch):
    one = EpisodeBatch(*(None if t is None else t[:1] for t in vars(batch).values()))
    together = EpisodeBatch(
        one.write_ids, one.write_mask, batch.read_ids, batch.read_mask, batch.labels, one.segment_ids
    )  # fmt: skip
    apart = EpisodeBatch(
        *(None if t is None else t[:1].expand(3, -1) for t in (batch.write_ids, batch.write_mask)),
        batch.read_ids, batch.read_mask, batch.labels,
        None if batch.segment_ids is None else batch.segment_ids[:1].expand(3, -1),
    )  # fmt: skip
    ours, theirs = episode_loss(model, together), episode_loss(model, apart)
    torch.testing.assert_close(ours.row_losses, theirs.row_losses)
    first, second = gradients(model, ours.loss), gradients(model, theirs.loss)
    assert all(relative_error(first[name], second[name]) < 1e-4 for name in first)


def test_the_read_part_writes_nothing_and_sees_no_tokens_of_the_write_context(model, batch):
    """The same state by other means gives the same loss: nothing but the state passes from write to read."""
    one = EpisodeBatch(*(None if t is None else t[:1] for t in vars(batch).values()))
    memory = MemoryState.zeros(model)
    chosen = {} if one.segment_ids is None else {"segment_ids": one.segment_ids}
    with torch.no_grad():
        model(one.write_ids, memory=memory, use_cache=False, **chosen)
        memory.frozen = True
        before = {i: state.clone() for i, state in memory.items()}
        logits = model(one.read_ids, memory=memory, use_cache=False).logits
    assert all(torch.equal(before[i], state) for i, state in memory.items())
    loss = F.cross_entropy(logits[0, :-1], one.labels[0, 1:], ignore_index=-100)
    torch.testing.assert_close(episode_loss(model, one).answer_loss, loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reentrant", (False, True))
def test_gradient_checkpointing_changes_nothing(model, batch, reentrant):
    plain = episode_loss(model, batch)
    expected = gradients(model, plain.loss)
    enable_checkpointing(model, reentrant)
    model.train()
    try:
        found = episode_loss(model, batch)
        found.loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(parameter.grad, expected[name], msg=name)
    finally:
        getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)()
        if reentrant:
            model.disable_input_require_grads()
        model.eval()
        model.zero_grad()
    assert torch.equal(found.loss, plain.loss)


def test_segment_ids_have_to_fit_the_adapter(model, batch):
    batch.segment_ids = torch.zeros_like(batch.write_ids) if batch.segment_ids is None else None
    with pytest.raises(ValueError, match="batch: the adapter's memory_write_granularity '.*' takes"):
        episode_loss(model, batch)


def test_without_a_label_there_is_nothing_to_learn(model, batch):
    batch.labels = torch.full_like(batch.labels, -100)
    with pytest.raises(ValueError, match="labels: got none"):
        episode_loss(model, batch)


def test_shapes_of_a_batch_are_checked():
    ids = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"read_mask: got shape \[2, 2\], allowed read_ids's \[2, 3\]"):
        EpisodeBatch(ids, ids > 0, ids, ids[:, :2] > 0, ids)
    with pytest.raises(ValueError, match="read_ids: got 1 rows for 2 write contexts, allowed as many"):
        EpisodeBatch(ids, ids > 0, ids[:1], ids[:1] > 0, ids[:1])


def test_a_write_pass_of_8192_tokens_is_differentiated():
    model = patch_model(
        tiny_model(num_hidden_layers=1, max_position_embeddings=8192), DeltaMemConfig(beta_bias_init=-9.0)
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".delta_memory." in name and parameter.requires_grad)
    write_ids = torch.randint(3, 128, (1, 8192))
    read_ids = torch.randint(3, 128, (1, 8))
    embedding = model.get_input_embeddings()
    seen = []
    hook = embedding.register_forward_hook(lambda m, a, out: seen.append(out.requires_grad_()))
    batch = EpisodeBatch(write_ids, write_ids > 0, read_ids, read_ids > 0, read_ids)
    loss = episode_loss(model, batch, gate_weight=0.0).loss
    hook.remove()
    # The first token's gradient comes from the answer alone, through 8191 steps of the state.
    (gradient,) = torch.autograd.grad(loss, seen[0])
    assert gradient.isfinite().all() and gradient[0, 0].abs().max() > 0
