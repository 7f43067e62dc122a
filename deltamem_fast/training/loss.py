"""The loss of an episode: write the context, read it back, cross-entropy on the answer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..adapter.record import identity_of
from ..adapter.wrappers import decoder_of, unwrap
from ..errors import ArgumentError
from ..memory.state import MemoryState
from ..memory.watch import GateRecord, record_gates

IGNORED = -100


@dataclass
class EpisodeBatch:
    """B episodes as tensors, padded on the right; all on one device.

    Write contexts may be fewer than read parts: with n · B read rows, rows i · n to i · n + n − 1 read what context i
    wrote.

    Attributes:
        write_ids: int64 [B, Tw], the write contexts. Tw is 1 or more; a row may be masked altogether, which is an
            empty context.
        write_mask: bool [B, Tw], True = a real token.
        read_ids: int64 [B, Tr], the read part of each episode, its answer included.
        read_mask: bool [B, Tr], True = a real token; the first token of each row is one.
        labels: int64 [B, Tr], the token at that place where it belongs to the answer, else −100. The logits of
            position t − 1 predict ``labels[:, t]``, as everywhere in transformers.
        segment_ids: int64 [B, Tw] (SSW), −1 = not written, or None.
    """

    write_ids: torch.Tensor
    write_mask: torch.Tensor
    read_ids: torch.Tensor
    read_mask: torch.Tensor
    labels: torch.Tensor
    segment_ids: torch.Tensor | None = None

    def __post_init__(self):
        for name, beside in (("write_mask", "write_ids"), ("segment_ids", "write_ids"), ("read_mask", "read_ids"),
                             ("labels", "read_ids")):  # fmt: skip
            tensor, other = getattr(self, name), getattr(self, beside)
            if tensor is not None and tensor.shape != other.shape:
                raise ArgumentError(f"{name}: got shape {list(tensor.shape)}, allowed {beside}'s {list(other.shape)}")
        rows, contexts = self.read_ids.shape[0], self.write_ids.shape[0]
        if not contexts or not rows or rows % contexts:
            raise ArgumentError(
                f"read_ids: got {rows} rows for {contexts} write contexts, allowed as many, or a multiple of it "
                "(several read parts for each context, one behind another)"
            )

    @property
    def tokens(self) -> int:
        """Real tokens, of both parts; on a GPU it waits for them."""
        return int(self.write_mask.sum() + self.read_mask.sum())

    def to(self, device) -> EpisodeBatch:
        """This batch on ``device``."""
        return EpisodeBatch(**{n: None if t is None else t.to(device) for n, t in vars(self).items()})


@dataclass
class EpisodeLoss:
    """What an episode batch costs.

    Attributes:
        loss: answer_loss + gate_weight · penalty; a scalar on the graph.
        answer_loss: mean cross-entropy over the answers' tokens, float32 scalar on the graph.
        penalty: mean over layers of (mean β − target)² on the written tokens, float32 scalar on the graph.
        row_losses: float32 [B], each row's cross-entropy summed over its answer, off the graph.
        row_tokens: int64 [B], how many tokens each answer has.
        gates: what ``record_gates`` saw of the write pass.
    """

    loss: torch.Tensor
    answer_loss: torch.Tensor
    penalty: torch.Tensor
    row_losses: torch.Tensor
    row_tokens: torch.Tensor
    gates: GateRecord


def episode_loss(
    model: nn.Module, batch: EpisodeBatch, gate_weight: float = 0.01, gate_target: float = 0.05
) -> EpisodeLoss:
    """Loss of a batch of episodes on a patched causal language model.

    The write contexts go through the decoder once, writing into an empty memory, without logits and without a
    gradient stop. Then the read parts go through the model from position 0, with no keys or values of the write
    contexts, reading that memory and writing nothing; cross-entropy is taken where ``labels`` are given.

    Args:
        model: a patched model with a language-model head, in train or eval mode; PEFT around it is fine.
        batch: on the model's device.
        gate_weight, gate_target: w and target of the write-sparsity term.

    Raises:
        ValueError: the model is not patched, the batch has segment ids that the adapter does not take (or none
            where it writes by segment), or no label.
    """
    config = identity_of(model).config
    if config.segmented is not (batch.segment_ids is not None):
        needed = "segment_ids" if config.segmented else "no segment_ids"
        raise ArgumentError(
            f"batch: the adapter's memory_write_granularity {config.memory_write_granularity!r} takes {needed}, got "
            "the opposite"
        )
    with record_gates() as gates:
        memory = write_memory(model, batch)
    penalty = gates.penalty(gate_target)
    row_losses, row_tokens = answer_losses(model, batch, memory)
    answer_loss = row_losses.sum() / row_tokens.sum()
    loss = answer_loss + gate_weight * penalty
    return EpisodeLoss(loss, answer_loss, penalty, row_losses.detach(), row_tokens, gates)


def write_memory(model: nn.Module, batch: EpisodeBatch) -> MemoryState:
    """The memory after the write contexts; under autograd on the graph."""
    memory = MemoryState.zeros(model, batch.write_ids.shape[0])
    # In a row without a token every query would attend to nothing, which some attention kernels answer with NaN:
    # let it see its first pad. What is written goes by token_mask alone.
    attended = batch.write_mask.clone()
    attended[:, 0] = True
    # The decoder alone: logits of 8192 tokens would cost more than all the rest.
    decoder_of(unwrap(model))(
        input_ids=batch.write_ids,
        attention_mask=attended,
        token_mask=batch.write_mask,
        memory=memory,
        segment_ids=batch.segment_ids,
        use_cache=False,
    )
    return memory


def answer_losses(model: nn.Module, batch: EpisodeBatch, memory: MemoryState) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's summed cross-entropy, float32 [B], and its number of answer tokens, int64 [B].

    Reads ``memory``; it is left read-only.
    """
    targets = batch.labels[:, 1:]
    labelled = targets != IGNORED
    # Logits where at least one row has an answer: a full row of them is 150,000 numbers a token.
    places = labelled.any(0).nonzero().flatten()
    if not len(places):
        raise ArgumentError(
            "labels: got none that is not −100 behind the first token, so there is nothing to learn from"
        )
    questions = batch.read_ids.shape[0] // memory.batch_size
    if questions > 1:
        memory = memory.repeat(questions)
    memory.frozen = True
    logits = model(
        input_ids=batch.read_ids,
        attention_mask=batch.read_mask,
        memory=memory,
        use_cache=False,
        logits_to_keep=places,
    ).logits
    losses = F.cross_entropy(logits.float().transpose(1, 2), targets[:, places], ignore_index=IGNORED, reduction="none")
    return losses.sum(1), labelled.sum(1)
