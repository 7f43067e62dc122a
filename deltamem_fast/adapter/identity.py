"""Which adapter on which backbone a memory belongs to."""

from __future__ import annotations

import functools
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..config import DeltaMemConfig
from ..errors import ArgumentError
from .fingerprints import (
    adapter_fingerprint,
    backbone_fields,
    backbone_fingerprint,
    backbone_name,
    differing_fields,
    first_backbone_fingerprint,
    public_label,
    public_name,
)
from .layer import DeltaMemory


@dataclass(frozen=True)
class LayerSpec:
    """Shape and place of one layer's state."""

    shape: tuple[int, int, int]  # [H, r, r], of one conversation
    device: torch.device

    def zeros(self, batch_size: int) -> torch.Tensor:
        return torch.zeros(batch_size, *self.shape, dtype=torch.float32, device=self.device)


def new_token() -> str:
    """A name that nobody else has, for an ``Identity``."""
    return secrets.token_hex(8)


@dataclass(eq=False)
class Identity:
    """Which adapter on which backbone a memory belongs to; outlives the model."""

    memories: dict[int, DeltaMemory]
    config: DeltaMemConfig
    backbone_config: Any
    adapter_name: str
    kept_fingerprints: dict[str, str] | None = None
    # Pickles carry it: a copy belongs to the adapter that it was made with, also when that was trained meanwhile.
    token: str = field(default_factory=new_token)
    accepted: list[Identity] = field(default_factory=list)

    def layer_specs(self) -> dict[int, LayerSpec]:
        """Layer index → shape and device of its state."""
        return {
            i: LayerSpec((m.rule.heads, m.rule.rank, m.rule.rank), m._parameters["memory_q_proj"].device)
            for i, m in self.memories.items()
        }

    def __post_init__(self):
        self.adapter_name = public_name(self.adapter_name)

    def fingerprints(self) -> dict[str, str]:
        """Fingerprints and readable names of adapter and backbone, as a saved memory holds them.

        ``backbone_fields`` is JSON. ``backbone_fingerprint_1`` is what the first format of the files has for
        ``backbone_fingerprint``.
        """
        if self.kept_fingerprints is not None:
            return self.kept_fingerprints
        fields = backbone_fields(self.backbone_config)
        return {
            "adapter_fingerprint": adapter_fingerprint(self.config, self.memories),
            "adapter_name": self.adapter_name,
            "backbone_fields": json.dumps(fields),
            "backbone_fingerprint": backbone_fingerprint(fields),
            "backbone_fingerprint_1": first_backbone_fingerprint(self.backbone_config),
            "backbone_name": backbone_name(self.backbone_config),
        }

    def described(self) -> str | None:
        """The fingerprints as JSON, for a pickle, which ``fingerprinted`` reads; None where they cannot be told.

        Sharded weights are in several processes, those on meta nowhere.
        """
        weights = [weight for memory in self.memories.values() for weight in memory.parameters()]
        if any(type(weight.data) is not torch.Tensor or weight.is_meta for weight in weights):
            return None
        try:
            return json.dumps(self.fingerprints() | {"token": self.token})
        except RuntimeError:  # in a forked process, which cannot read what lies on a GPU
            return None

    def check(self, other: Identity | None) -> None:
        """Raise ValueError if a memory of ``other`` was made with another adapter or backbone; names both."""
        if other is None or other.token == self.token or any(other is known for known in self.accepted):
            return
        difference = describe_difference(other.fingerprints(), self.fingerprints())
        if difference:
            raise ArgumentError(f"memory: made under {difference}")
        if self.memories:  # one that is known by its fingerprints alone lives on, and must hold no model's weights
            self.accepted.append(other)


@functools.lru_cache(maxsize=256)
def fingerprinted(fingerprints: str) -> Identity:
    """The identity of an adapter that is not here, by ``described`` of it; one object for each."""
    values = json.loads(fingerprints)
    token = values.pop("token")
    return Identity({}, DeltaMemConfig(), None, values["adapter_name"], kept_fingerprints=values, token=token)


def describe_difference(theirs: Mapping[str, str], ours: Mapping[str, str]) -> str:
    """What differs between the fingerprints of a memory and of a model, both named; "" if nothing.

    Args:
        theirs: as a file has them; of the first format too.
        ours: of ``Identity.fingerprints``.
    """
    for part in ("backbone", "adapter"):
        found = theirs.get(f"{part}_fingerprint")
        known = [ours[f"{part}_fingerprint"]]
        if "backbone_fields" not in theirs:
            known.append(ours.get(f"{part}_fingerprint_1"))
        if isinstance(found, str) and found in known:
            continue
        them = f"{public_label(str(theirs.get(f'{part}_name'))):.200} ({str(found or '?')[:12]})"
        us = f"{ours[f'{part}_name']} ({ours[f'{part}_fingerprint'][:12]})"
        return f"{part} {them}, but the model's {part} is {us}" + _reason(part, theirs, ours)
    return ""


def _reason(part: str, theirs: Mapping[str, str], ours: Mapping[str, str]) -> str:
    """Which fields of the backbones differ, as far as the file says."""
    if part != "backbone":
        return ""
    try:
        fields = json.loads(theirs["backbone_fields"])
        difference = differing_fields(fields, json.loads(ours["backbone_fields"]))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return "; the file has no fields of its backbone, only a fingerprint, so that it cannot say which differ"
    return f"; they differ in {difference}" if difference else ""
