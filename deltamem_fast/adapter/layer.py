"""DeltaMemory: the parameters of one layer, and their start."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import nn

from deltamem_kernels.dispatch import operations

from ..config import DELTA_HEADS, DeltaMemConfig
from ..errors import ArgumentTypeError


class DeltaMemory(nn.Module):
    """The adapter of one attention layer.

    Parameters have the released names and shapes: ``memory_{q,k,v}_proj`` [H·r, d], ``beta_proj`` [H·r or H, d],
    ``beta_bias``, ``lambda_proj`` and ``lambda_bias`` where λ is not coupled, ``delta_{q,k,v,o}_proj``
    [out, H·r], ``delta_o_rmsnorm_weight`` [out], ``delta_scale_raw`` [1 or 4].

    Args:
        config: the adapter's configuration.
        hidden: the size of the attention's input.
        outputs: the size of each projection's output, by head; 0: there is none.
        layer_idx: the attention's index, the key of its state.
        backend: ``auto``, ``triton``, ``numba`` or ``reference``.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        config: DeltaMemConfig,
        hidden: int,
        outputs: Mapping[str, int],
        layer_idx: int,
        backend="auto",
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.config = config
        self.rule = config.rule
        self.layer_idx = layer_idx
        self.backend = backend
        # Its rows in packed storage (model.weights.LayerWeights), once a model is patched with it.
        self.weights = None
        self.loads = 0  # times that load_state_dict has been here, once a model is patched with it
        width, gates = self.rule.read_width, self.rule.gate_width

        def parameter(*size):
            return nn.Parameter(torch.empty(*size, device=device, dtype=dtype))

        self.memory_q_proj = parameter(width, hidden)
        self.memory_k_proj = parameter(width, hidden)
        self.memory_v_proj = parameter(width, hidden)
        self.beta_proj = parameter(gates, hidden)
        self.beta_bias = parameter(gates)
        if not config.couple_lambda:
            self.lambda_proj = parameter(gates, hidden)
            self.lambda_bias = parameter(gates)
        for head in DELTA_HEADS:
            weight = parameter(outputs[head], width)
            weight.requires_grad_(head in config.delta_heads)
            setattr(self, f"delta_{head}_proj", weight)
        if config.delta_o_rmsnorm:
            self.delta_o_rmsnorm_weight = parameter(outputs["o"])
        if config.trainable_delta_scale:
            self.delta_scale_raw = parameter(4 if config.delta_scale_granularity == "head" else 1)

    def __setattr__(self, name: str, value) -> None:
        if name != "_hf_hook":
            super().__setattr__(name, value)
            return
        # accelerate offloads every module that has parameters, and loads them around its forward, which this has none
        # of. The adapter is small: it stays where the layer computes.
        value.detach_hook(self)
        if getattr(value, "execution_device", None) is not None:
            self.to(value.execution_device)

    def extra_repr(self) -> str:
        rule = self.rule
        return f"layer={self.layer_idx}, rank={rule.rank}, heads={rule.heads}, delta_heads={self.config.delta_heads}"

    @torch.no_grad()
    def reset_parameters(self, base_weights: dict[str, torch.Tensor]) -> None:
        """Start the parameters as the configuration says.

        Args:
            base_weights: the attention's own projection weights, [out, in] by head; needed for the heads that
                ``base_slice`` and ``base_slice_fixed`` start from.
        """
        config = self.config
        for name in ("memory_q_proj", "memory_k_proj", "memory_v_proj"):
            nn.init.kaiming_uniform_(getattr(self, name), a=math.sqrt(5))
        nn.init.zeros_(self.beta_proj)
        nn.init.constant_(self.beta_bias, config.beta_bias_init)
        if not config.couple_lambda:
            nn.init.zeros_(self.lambda_proj)
            nn.init.constant_(self.lambda_bias, -config.beta_bias_init)
        for head in DELTA_HEADS:
            weight = getattr(self, f"delta_{head}_proj")
            nn.init.zeros_(weight)
            if head in config.delta_heads:
                self._start_correction(weight, base_weights.get(head))
        if config.delta_o_rmsnorm:
            nn.init.ones_(self.delta_o_rmsnorm_weight)
        if config.trainable_delta_scale:
            share = min(max(config.delta_scale_init / config.delta_scale_max, 1e-4), 1 - 1e-4)
            nn.init.constant_(self.delta_scale_raw, math.log(share / (1 - share)))

    def _start_correction(self, weight: torch.Tensor, base: torch.Tensor | None) -> None:
        config = self.config
        if config.output_init == "random":
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
            weight.mul_(config.online_gain)
        elif config.output_init != "zero":
            width = min(self.rule.rank, base.shape[1])
            if config.output_init == "base_slice_fixed":
                width = min(width, config.base_slice_ref_width)
            columns = F.normalize(base[:, :width].float(), dim=0, eps=1e-6)
            weight[:, :width].copy_(columns * config.online_gain)

    @property
    def row_names(self) -> tuple[str, ...]:
        """The parameters whose rows, one behind another, make the matrix [W, d] of all raw projections."""
        rows = ("memory_q_proj", "memory_k_proj", "memory_v_proj", "beta_proj")
        return (*rows, "lambda_proj") if self.rule.has_lambda else rows

    @property
    def gate_bias_names(self) -> tuple[str, ...]:
        """The gates' biases in the order of their rows."""
        return ("beta_bias", "lambda_bias") if self.rule.has_lambda else ("beta_bias",)

    @property
    def used_names(self) -> tuple[str, ...]:
        """The parameters that the configuration has a use for; the others get no gradient."""
        config = self.config
        names = [*self.row_names, *self.gate_bias_names, *(f"delta_{head}_proj" for head in config.delta_heads)]
        if config.delta_o_rmsnorm and "o" in config.delta_heads:
            names.append("delta_o_rmsnorm_weight")
        if config.trainable_delta_scale:
            names.append("delta_scale_raw")
        return tuple(names)

    def stacked(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows of q, k, v, β (and λ) as one matrix [W, d], and the gates' biases; differentiable."""
        return torch.cat([getattr(self, name) for name in self.row_names]), self.gate_bias()

    def gate_bias(self) -> torch.Tensor:
        """The bias of β (and λ) as one vector, a copy; differentiable."""
        # One alone is copied, too: a backend may hand it to NumPy, which would pin a storage that FSDP wants to free.
        return torch.cat([getattr(self, name) for name in self.gate_bias_names])

    def project(self, hidden_states: torch.Tensor, packed: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Raw projections [..., W] of hidden states [..., d], in their dtype, and the gates' biases as stored.

        Args:
            packed: take the packed storage (``LayerWeights.usable``), through which nothing is differentiated.
        """
        weight, bias = self.weights.memory_rows() if packed else self.stacked()
        return F.linear(hidden_states, weight.to(hidden_states.dtype)), bias

    def _scaled(self, head: str, reads: torch.Tensor) -> torch.Tensor:
        """Reads times the learnt factor c_h = σ(raw_h) · max on head ``q``, ``k``, ``v`` or ``o``, if there is one."""
        if not self.config.trainable_delta_scale:
            return reads
        per_head = self.config.delta_scale_granularity == "head"
        raw = self.delta_scale_raw[DELTA_HEADS.index(head) if per_head else 0]
        # c is one number a head and Δ is linear in the reads: no need for another pass over Δ.
        return reads * (torch.sigmoid(raw.float()) * self.config.delta_scale_max)

    def correct(
        self, head: str, output: torch.Tensor, reads: torch.Tensor, part: Callable[..., tuple] | None = None
    ) -> torch.Tensor:
        """``output`` of projection ``head`` plus its correction.

        Args:
            head: one of the configuration's ``delta_heads``.
            output: [..., out], the projection's output.
            reads: float32 [..., H·r].
            part: makes of reads, times c_h, and the head's weight those of the rows that ``output`` is of.
        """
        reads, weight = self._scaled(head, reads), getattr(self, f"delta_{head}_proj")
        if part is not None:
            reads, weight = part(reads, weight)
        norm = self.delta_o_rmsnorm_weight if head == "o" and self.config.delta_o_rmsnorm else None
        return operations(self.backend, output.device).steer(
            output, reads, weight, self.config.scale,
            norm_weight=norm, eps=self.config.delta_o_rmsnorm_eps,
        )  # fmt: skip

    def output_delta(self, reads: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Δo of reads, float32 [..., H·r], alone: [..., out of o_proj] in ``dtype``. Not differentiable."""
        norm = self.delta_o_rmsnorm_weight if self.config.delta_o_rmsnorm else None
        return operations(self.backend, reads.device).delta(
            self._scaled("o", reads), self.delta_o_proj, self.config.scale, dtype,
            norm_weight=norm, eps=self.config.delta_o_rmsnorm_eps,
        )  # fmt: skip


def refuse_pickling() -> NoReturn:
    """Of what holds methods of this process: it could be written, and not read."""
    raise ArgumentTypeError(
        "a patched model, or a part of it, cannot be pickled; use save_pretrained (it writes the adapter too), or "
        "unpatch_model first"
    )
