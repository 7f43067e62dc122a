"""DeltaMemConfig: what an adapter is, apart from its weights."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deltamem_kernels.rule import MAX_RANK, STATE_UPDATE_MODES, DeltaRule

from .arguments import check_choice, check_integer, check_type, shown
from .errors import ArgumentError, FileFormatError, FileMissingError
from .storage.files import as_path, parse_json, read_bytes, write_json

CONFIG_NAME = "delta_mem_config.json"
FORMAT_VERSION = 1
# H·r is then at most 4,096: a read has as many numbers as the hidden state of an 8B model, and a layer's states 1 MB.
MAX_STATE_HEADS = 64
_MOST_BYTES = 2**20  # of a configuration file; ours has 2 kB
_MOST_LAYERS = 4096  # entries of target_layers, and indices
_MOST_NAMES = 64  # of target_modules
_MOST_FLOAT = 3.4028234663852886e38  # of float32, in which it is computed
DELTA_HEADS = ("q", "k", "v", "o")
OUTPUT_INITS = ("zero", "random", "base_slice", "base_slice_fixed")
GRANULARITIES = ("token", "message_mean", "sentence_mean")
SCALE_GRANULARITIES = ("layer", "head")

# Keys that the released configuration still carries and that are legal at this value only.
ARCHIVED = {
    "num_memory_partitions": 1,
    "num_global_memory_partitions": 0,
    "memory_partition_routing": "soft",
    "memory_partition_basis": "shared",
    "tie_memory_partition_read_write": False,
    "memory_partition_read_mode": "softmax",
    "memory_partition_sigmoid_gate_bias_init": -2.0,
    "slot_read_top_k": 0,
    "global_memory_mode": "shared_rw",
    "global_memory_read_top_k": 0,
    "global_memory_merge_mode": "gated_residual",
    "global_memory_gate_bias_init": -2.0,
    "global_memory_read_logit_bias": 0.0,
    "memory_reader_layers": [],
    "memory_reader_hidden_size": 1024,
    "memory_reader_residual_scale": 0.1,
    "memory_reader_read_only": True,
    "memory_readout_mode": "delta",
    "memory_write_source": "learned_hidden",
    "memory_write_proposals_per_message": 2,
    "synthetic_memory_slots": 1,
    "latent_memory_layers": [],
    "latent_memory_hidden_size": 1024,
    "latent_memory_residual_scale": 0.1,
    "latent_memory_slots": 4,
    "latent_memory_init_std": 0.002,
    "latent_gate_init": 0.01,
    "delta_scale_parameterization": "alpha_over_rank",
}

# What a key means that a released file leaves out, where the released code's default is not ours.
_RELEASED_DEFAULTS = {"output_init": "zero", "delta_heads": list(DELTA_HEADS)}


@dataclass(frozen=True)
class DeltaMemConfig:
    """Configuration of a δ-mem adapter; the defaults are the released recipe (TSW, q and o).

    Attributes:
        rank: r, 1 to 64.
        alpha: the correction is scaled by alpha / rank.
        beta_bias_init: start of β's bias (and, negated, of λ's).
        normalize_qk: q and k are unit(tanh(·)), else raw.
        couple_lambda: λ = 1 − β, else λ has a projection of its own.
        state_update_mode: ``standard``, ``lambda_outside`` or ``no_lambda``.
        rankwise_gates: one gate per state row, else one per head.
        output_init: start of the correction's weights: ``zero``, ``random``, ``base_slice``,
            ``base_slice_fixed``.
        base_slice_ref_width: columns that ``base_slice_fixed`` takes, at most rank.
        online_gain: their norm, and the factor of ``random``.
        num_state_heads: H, 1 to 64; more than 1 is MSW.
        memory_write_granularity: ``token`` (TSW, MSW), ``message_mean`` or ``sentence_mean`` (SSW).
        target_modules: the attention's name in its decoder layer.
        target_layers: layer indices, empty = all.
        delta_heads: which projections are corrected, of q, k, v, o.
        delta_o_rmsnorm, delta_o_rmsnorm_eps: RMS norm on Δo.
        trainable_delta_scale, delta_scale_init, delta_scale_max, delta_scale_granularity: a learnt factor
            σ(raw) · max on the correction, one per ``layer`` or one per ``head``.

    Raises:
        ValueError: naming the key, what was given and what is allowed.
    """

    rank: int = 8
    alpha: float = 16.0
    beta_bias_init: float = -1.5
    normalize_qk: bool = True
    couple_lambda: bool = True
    state_update_mode: str = "standard"
    rankwise_gates: bool = True
    output_init: str = "base_slice_fixed"
    base_slice_ref_width: int = 8
    online_gain: float = 0.05
    num_state_heads: int = 1
    memory_write_granularity: str = "token"
    target_modules: tuple[str, ...] = ("self_attn",)
    target_layers: tuple[int, ...] = ()
    delta_heads: tuple[str, ...] = ("q", "o")
    delta_o_rmsnorm: bool = False
    delta_o_rmsnorm_eps: float = 1e-6
    trainable_delta_scale: bool = False
    delta_scale_init: float = 1.0
    delta_scale_max: float = 2.0
    delta_scale_granularity: str = "layer"
    archived: dict[str, Any] = field(default_factory=dict, compare=False, repr=False, hash=False)

    def __post_init__(self):
        for name, kind in _active_fields(self).items():
            object.__setattr__(self, name, _typed(name, kind, getattr(self, name)))
        check_integer(self.rank, "rank", 1, MAX_RANK)
        check_integer(self.num_state_heads, "num_state_heads", 1, MAX_STATE_HEADS)
        check_integer(self.base_slice_ref_width, "base_slice_ref_width", 1, None)
        check_choice(self.state_update_mode, "state_update_mode", STATE_UPDATE_MODES)
        check_choice(self.output_init, "output_init", OUTPUT_INITS)
        check_choice(self.memory_write_granularity, "memory_write_granularity", GRANULARITIES)
        check_choice(self.delta_scale_granularity, "delta_scale_granularity", SCALE_GRANULARITIES)
        for head in self.delta_heads:
            check_choice(head, "delta_heads", DELTA_HEADS)
        object.__setattr__(self, "delta_heads", tuple(dict.fromkeys(self.delta_heads)))
        _allow("target_layers", self.target_layers, len(self.target_layers) <= _MOST_LAYERS, f"{_MOST_LAYERS} at most")
        for layer in self.target_layers:
            _allow("target_layers", layer, 0 <= layer < _MOST_LAYERS, f"layer indices, 0 to {_MOST_LAYERS - 1}")
        names = 0 < len(self.target_modules) <= _MOST_NAMES
        _allow("target_modules", self.target_modules, names, f"1 to {_MOST_NAMES} names")
        _allow("delta_o_rmsnorm_eps", self.delta_o_rmsnorm_eps, self.delta_o_rmsnorm_eps > 0, "more than 0")
        _allow("delta_scale_max", self.delta_scale_max, self.delta_scale_max > 0, "more than 0")
        between = 0 < self.delta_scale_init < self.delta_scale_max
        _allow("delta_scale_init", self.delta_scale_init, between, f"between 0 and {self.delta_scale_max}")
        for key, value in self.archived.items():
            if key not in ARCHIVED:
                raise ArgumentError(f"{str(key)[:200]}: unknown configuration key")
            if _plain(value) != ARCHIVED[key] or isinstance(value, bool) is not isinstance(ARCHIVED[key], bool):
                raise ArgumentError(
                    f"{key}: archived, got {shown(value, 200)}, allowed its default {ARCHIVED[key]!r} only"
                )

    @classmethod
    def tsw(cls, **changes) -> DeltaMemConfig:
        """Token-state write: every token is written."""
        return cls(**{"memory_write_granularity": "token", "num_state_heads": 1, **changes})

    @classmethod
    def ssw(cls, granularity: str = "message_mean", **changes) -> DeltaMemConfig:
        """Segment-state write: the mean of each message (or ``sentence_mean``) is written once."""
        check_choice(granularity, "granularity", GRANULARITIES[1:])
        return cls(**{"memory_write_granularity": granularity, **changes})

    @classmethod
    def msw(cls, heads: int = 4, **changes) -> DeltaMemConfig:
        """Multi-state write: ``heads`` states per layer, each with its own projections."""
        return cls(**{"num_state_heads": heads, **changes})

    @classmethod
    def preset(cls, name: str, **changes) -> DeltaMemConfig:
        """The preset ``tsw``, ``ssw`` or ``msw`` by name."""
        check_choice(name, "preset", ("tsw", "ssw", "msw"))
        return getattr(cls, name)(**changes)

    @property
    def rule(self) -> DeltaRule:
        """The recurrence that this configuration asks for."""
        return DeltaRule(
            rank=self.rank,
            heads=self.num_state_heads,
            mode=self.state_update_mode,
            row_gates=self.rankwise_gates,
            coupled=self.couple_lambda,
            normalize=self.normalize_qk,
        )

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank

    @property
    def segmented(self) -> bool:
        """Whether writes go by segment (SSW)."""
        return self.memory_write_granularity != "token"

    def to_dict(self) -> dict[str, Any]:
        """A JSON object that the released code reads too: every key, archived ones at their default."""
        return {name: _plain(getattr(self, name)) for name in _active_fields(self)} | ARCHIVED

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DeltaMemConfig:
        """Read a released configuration, or ours (which has a ``format_version``).

        A key left out takes the default of the code that wrote the file.

        Raises:
            ValueError: an unknown key, an archived key that is not at its default, a value out of range, or a
                format version that is newer than this code's.
        """
        check_type(values, "values", dict, "a dict of configuration keys")
        values = dict(values)
        version = values.pop("format_version", None)
        if version is None:
            values = _RELEASED_DEFAULTS | values
        elif type(version) is not int or not 1 <= version <= FORMAT_VERSION:
            raise ArgumentError(
                f"format_version: got {shown(version)}, this version of deltamem-fast reads 1 to {FORMAT_VERSION}"
            )
        active = _active_fields(cls)
        archived = {key: values.pop(key) for key in list(values) if key not in active}
        return cls(**values, archived=archived)

    def save(self, directory: str | os.PathLike, *, released: bool = False) -> Path:
        """Write ``delta_mem_config.json`` into ``directory``, atomically; ``released`` leaves out our version."""
        version = {} if released else {"format_version": FORMAT_VERSION}
        return write_json(as_path(directory, "directory") / CONFIG_NAME, version | self.to_dict(), private=False)

    @classmethod
    def load(cls, directory: str | os.PathLike) -> DeltaMemConfig:
        """Read ``delta_mem_config.json`` from ``directory``; errors name the file."""
        path = as_path(directory, "directory") / CONFIG_NAME
        if not path.is_file():
            raise FileMissingError(f"{path}: no such file; an adapter directory holds a {CONFIG_NAME}")
        values = parse_json(read_bytes(path, "adapter", most=_MOST_BYTES), path)
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise FileFormatError(f"{path}: {error}") from error


def _plain(value):
    return list(value) if isinstance(value, tuple) else value


def _allow(name: str, value, condition: bool, allowed: str) -> None:
    if not condition:
        raise ArgumentError(f"{name}: got {shown(value, 200)}, allowed {allowed}")


def _active_fields(config) -> dict[str, str]:
    """Name → type, as it is written, of each key but the archived ones."""
    return {entry.name: entry.type for entry in dataclasses.fields(config) if entry.name != "archived"}


def _typed(name: str, kind: str, value):
    """``value`` as the annotated type, or an error that names the key; an integer's and a word's range tells all."""
    if kind == "bool":
        _allow(name, value, isinstance(value, bool), "true or false")
    if kind == "float":
        number = isinstance(value, int | float) and not isinstance(value, bool)
        _allow(name, value, number and abs(value) <= _MOST_FLOAT, "a finite number that float32 can hold")
        return float(value)
    if not kind.startswith("tuple"):
        return value
    _allow(name, value, isinstance(value, list | tuple), "a list")
    item = int if "int" in kind else str
    _allow(name, value, all(type(v) is item for v in value), f"a list of {item.__name__}")
    return tuple(value)
