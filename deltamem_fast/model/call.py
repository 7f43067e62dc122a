"""What one forward of the model hands to its attention layers: whose memory, which tokens, and how gradients travel."""

from __future__ import annotations

import torch

from deltamem_kernels.rule import DeltaRule

from ..errors import ArgumentError
from ..memory.state import MemoryState, writable
from ..memory.watch import GateSums, gate_sums
from .cache import Fed


class MemoryCall:
    """What one forward of the model hands to its attention layers.

    No dataclass: FSDP looks into those that are arguments of a layer, and hands on a copy.

    Attributes:
        state: the memory that is read and written; None when a differentiable forward is over: recomputations do
            without, and its tensors' graphs lead back to this call.
        token_mask: bool [B, T], True = a real token, or None = all are.
        segment_ids: int [B, T] (SSW) or None.
        cu_seqlens: int [N + 1] over B · T tokens, for packed sequences, or None.
        trust: float32 [B, T], with which share of its strength each token is written; None = all whole.
        rule: the guarded recurrence of this forward; None = the layers' own.
        frozen: read-only.
        in_place: no autograd outside: states keep their address.
        initial: the state that each layer started this forward from. A recomputation (gradient checkpointing)
            finds it here, and does not write a second time.
        bridge: of gradients past checkpointed and sharded layers; None in place.
        gates: sums over the gates of each layer's written tokens, empty when the forward is over; None: nobody asked.
        fed: what is known of the cache that keys and values go to; None: there is none.
        held: how many tokens that had got before this forward; None: not counted.
        bypassed: the functions that a layer of this forward has found as they were; see ``weights``.
        projections: by layer the raw projections [B, T, W] of this forward's tokens; None: nobody asked.
    """

    def __init__(
        self,
        state: MemoryState,
        token_mask: torch.Tensor | None = None,
        segment_ids: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        *,
        trust: torch.Tensor | None = None,
        rule: DeltaRule | None = None,
        frozen: bool = False,
        bridge: Bridge | None = None,
        gates: dict[int, GateSums] | None = None,
        projections: dict[int, torch.Tensor] | None = None,
        fed: Fed | None = None,
        held: int | None = None,
    ):
        self.state: MemoryState | None = state
        self.token_mask = token_mask
        self.segment_ids = segment_ids
        self.cu_seqlens = cu_seqlens
        self.trust = trust
        self.rule = rule
        self.frozen = frozen
        self.in_place = bridge is None
        self.initial: dict[int, torch.Tensor] = {}
        self.bridge = bridge
        self.gates = gates
        self.projections = projections
        self.fed = fed
        self.held = held
        self.bypassed: tuple | None = None
        self._unmasked: torch.Tensor | None = None
        self.records = gates is not None or projections is not None
        # Whether tokens may be read, or read and written, where the state lies; but for that state itself.
        # Never by what is recorded: recording changes no bit.
        self.may_read = cu_seqlens is None
        self.may_step = self.may_read and self.in_place and segment_ids is None

    def rule_of(self, layer) -> DeltaRule:
        """The recurrence of an adapter layer in this forward."""
        return layer.rule if self.rule is None else self.rule

    def start(self, layer: int) -> tuple[torch.Tensor, bool]:
        """The state that a layer starts from, and whether this is its first run in this forward."""
        first_run = layer not in self.initial
        if first_run:
            state = self.state[layer]
            if not self.in_place and not torch.compiler.is_compiling() and state.is_inference():
                state = state.clone()  # autograd cannot save one that was made in inference mode
            self.initial[layer] = state
            if not self.in_place and not torch.is_grad_enabled():
                # It runs without a graph in a differentiable forward: reentrant checkpointing recomputes it later.
                if state.requires_grad and not self.bridge.entered:
                    raise ArgumentError(UNKNOWN_CHECKPOINTS)
                self.bridge.unseen.add(layer)
        elif self.bridge is not None and layer in self.bridge.unseen:
            return self.bridge.start(layer, self.initial[layer]), False
        return self.initial[layer], first_run

    def cut_short(self, error: BaseException, state: MemoryState | None) -> None:
        """Mark what a forward that failed may have left half-written; nothing, if no layer had begun.

        Args:
            error: what it failed with.
            state: the memory that it was to write.
        """
        if self.fed is not None and self.initial:
            self.fed.cut_short(error)
        elif self.fed is not None:
            self.fed.tokens = self.held
        if self.initial and not self.frozen and state is not None:
            state.interrupt(error)

    def leave_out(self, finite: torch.Tensor) -> None:
        """Mask tokens that are not ``finite``, bool [B, T]; the mask of before tells what is to be counted."""
        self._unmasked = self.token_mask
        self.token_mask = finite if self.token_mask is None else self.token_mask & finite

    def count_left_out(self, finite: torch.Tensor) -> None:
        """Add the tokens that ``leave_out`` has masked to every layer's count of those that were not written."""
        if self.frozen:
            return
        lost = ~finite if self._unmasked is None else self._unmasked & ~finite
        if self.segment_ids is not None:
            lost = lost & (self.segment_ids >= 0)
        if self.cu_seqlens is None:
            counts = lost.sum(1, dtype=torch.int32)
        else:
            before = torch.nn.functional.pad(lost.flatten().cumsum(0, dtype=torch.int32), (1, 0))
            counts = before[self.cu_seqlens[1:].long()] - before[self.cu_seqlens[:-1].long()]
        self.state.count_in_all(list(self.initial), counts)

    def keep(self, layer: int, projections: torch.Tensor) -> None:
        """Keep a layer's raw projections [B, T, W], if they were asked for."""
        if self.projections is not None:
            # A copy: on the fast path they lie in a packed row, whose other columns are changed in place.
            self.projections[layer] = projections.detach().clone()

    def count_gates(self, layer: int, projections: torch.Tensor, gate_bias: torch.Tensor, rule: DeltaRule) -> None:
        """Sum over the gates of a layer's tokens [B, T, W], written where the state lies, if it was asked for."""
        if self.gates is not None:
            self.gates[layer] = gate_sums(projections, gate_bias, rule, self.token_mask)

    def steps(self, layer: int) -> bool:
        """Whether a layer's state can be written where it lies."""
        return (
            self.may_step
            and writable(self.initial.get(layer, self.state[layer]))
            and writable(self.state.counter(layer))
        )


def with_hidden(output, hidden: torch.Tensor):
    """A decoder's output with another last hidden state."""
    if isinstance(output, tuple):
        return hidden, *output[1:]
    output["last_hidden_state"] = hidden
    return output


UNKNOWN_CHECKPOINTS = (
    "memory: got one with gradients, but the layers run under reentrant checkpointing that is not the model's own (or "
    "take more than embeddings from input_ids), so no gradient would come back to it; allowed: use_reentrant=False in "
    "gradient_checkpointing_enable(), or memory.detach()"
)


class Bridge:
    """Gradients on their way, by layer, in the backward of one forward.

    Attributes:
        entered: ``checkpointing.enter`` has been there, so that gradients of initial states come back.
        ordered: no gradient may reach a layer but after its output's.
        unseen: layers that ran without a graph.
    """

    def __init__(self, ordered: bool = False):
        self.entered = False
        self.ordered = ordered
        self.unseen: set[int] = set()
        self._written: dict[int, tuple[torch.Tensor | None, ...]] = {}
        self._started: dict[int, torch.Tensor] = {}

    def keep(self, layer: int, gradients: tuple[torch.Tensor | None, ...]) -> None:
        """Keep the gradients of what an unseen layer wrote until it is recomputed."""
        if layer in self.unseen:
            self._written[layer] = gradients

    def take(self, layer: int) -> tuple[torch.Tensor | None, ...]:
        """What was kept for a layer, once."""
        return self._written.pop(layer, (None, None))

    def start(self, layer: int, initial: torch.Tensor) -> torch.Tensor:
        """What a recomputed layer starts from: a leaf, where its backward ends and leaves the gradient."""
        if not initial.requires_grad:
            return initial
        self._started[layer] = initial.detach().requires_grad_()
        return self._started[layer]

    def start_gradient(self, layer: int) -> torch.Tensor | None:
        """The gradient of what a layer started from, once; None where its graph was seen."""
        started = self._started.pop(layer, None)
        return None if started is None else started.grad
