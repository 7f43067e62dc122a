"""Which tokens of a text a memory writes and reads most, token by token."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ..adapter.record import identity_of, is_disabled
from ..adapter.wrappers import decoder_of, input_device, unwrap
from ..arguments import check_choice
from ..display import number, plain, printable, table
from ..errors import ArgumentError
from ..memory.state import MemoryState
from ..memory.watch import capture_projections
from ..text.encode import encode_text
from .replay import Replay, replay

MEASURES = ("writes", "reads")
_TOTALS = {"write": "writes", "read": "reads", "beta": "beta", "norm": "norms"}  # what a token's totals are called
KEPT_TOKENS = 256
KEPT_NUMBERS = 2_500_000  # of all kept states together: 10 MB
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_UNKNOWN = "\N{REPLACEMENT CHARACTER}"


class Entry(NamedTuple):
    """A token, or with segments a segment, that wrote or read much: the places of its tokens, its text, the size."""

    positions: tuple[int, ...]
    text: str
    size: float


@dataclass(frozen=True, eq=False)
class Trace(Replay):
    """What T tokens of a text did to a memory in each of L layers and H heads.

    All tensors are float32 on the CPU. See ``Replay`` for what each number is, and what it is with segments; its
    ``states`` are None too where the text is longer than ``KEPT_TOKENS`` or they would be more than ``KEPT_NUMBERS``
    numbers.

    Attributes:
        tokens: what each token stands for in the text.
        token_ids: of each token.
        segment_ids: of each token, −1 = not written; None where every token is written.
        layers: the indices of the L layers.
        frozen: the memory is read-only: nothing was written.
        initial: [L, H, r, r], the state before the first token.
        memory: what the forward itself left, a copy of the memory that it started from with the text written.
    """

    tokens: tuple[str, ...]
    token_ids: tuple[int, ...]
    segment_ids: tuple[int, ...] | None
    layers: tuple[int, ...]
    frozen: bool
    initial: torch.Tensor
    memory: MemoryState

    def __len__(self) -> int:
        return len(self.tokens)

    def total(self, measure: str) -> torch.Tensor:
        """[T], over all layers and heads: the root of the sum of squares; of ``beta`` the mean."""
        values = getattr(self, measure)
        return values.mean((1, 2)) if measure == "beta" else values.square().sum((1, 2)).sqrt()

    def top(self, measure: str, count: int = 8) -> list[Entry]:
        """The ``count`` largest entries over all layers and heads, largest first; without those that are 0.

        Writes with segments are told by segment.

        Args:
            measure: ``writes`` or ``reads``.
        """
        check_choice(measure, "measure", MEASURES)
        sizes = self.total(measure).tolist()
        groups: dict[int, list[int]] = {}
        for position, size in enumerate(sizes):
            together = measure == "writes" and self.segment_ids is not None
            # Of a segment's tokens some layer may have left out one that was not finite: the largest tells its size.
            if size > 0:
                groups.setdefault(self.segment_ids[position] if together else position, []).append(position)
        entries = [
            Entry(tuple(places), "".join(self.tokens[i] for i in places), max(sizes[i] for i in places))
            for places in groups.values()
        ]
        return sorted(entries, key=lambda entry: -entry.size)[:count]

    def to_dict(self) -> dict:
        """One JSON object: of each token its figures over all layers, and sizes of writes and reads [layer][head]."""
        totals = {name: self.total(measure).tolist() for name, measure in _TOTALS.items()}
        tokens = [
            {
                "position": i,
                "token": self.tokens[i],
                "id": self.token_ids[i],
                "segment": None if self.segment_ids is None else self.segment_ids[i],
                **{name: plain(values[i]) for name, values in totals.items()},
                "writes": [[plain(size) for size in heads] for heads in self.writes[i].tolist()],
                "reads": [[plain(size) for size in heads] for heads in self.reads[i].tolist()],
            }
            for i in range(len(self))
        ]
        return {"layers": list(self.layers), "frozen": self.frozen, "tokens": tokens}

    def __str__(self) -> str:
        """A table, a token a line, its figures over all layers and heads."""
        columns = {"token": [str(i) for i in range(len(self))]}
        if self.segment_ids is not None:
            columns["segment"] = [str(i) if i >= 0 else "-" for i in self.segment_ids]
        columns |= {name: list(map(number, self.total(measure).tolist())) for name, measure in _TOTALS.items()}
        columns["text"] = [f"'{printable(token)}'" for token in self.tokens]
        headings = ["state norm" if name == "norm" else name for name in columns]
        return table(headings, list(zip(*columns.values())), left=[len(columns) - 1])


@torch.no_grad()
def trace(
    model: nn.Module,
    tokenizer,
    text: str | Sequence[Mapping],
    memory: MemoryState | None = None,
) -> Trace:
    """Run a text through a patched model once, and say what each of its tokens wrote and read.

    The sizes are computed from the forward's own projections with the reference mathematics, in float32.

    With segments (SSW) every token reads the state as it was before the text. What is written of a segment is said of
    each of its tokens.

    Args:
        model: patched.
        text: a string is one user message if the tokenizer has a chat template, else plain tokens; or a list of
            messages with ``role`` and ``content``.
        memory: what to start from, of one conversation; it is not changed. None = an empty one. Of a read-only one
            (``memory.frozen``) nothing is written here either.

    Raises:
        ValueError: the model is not patched, its memory is switched off, its forward is compiled; the memory is
            another adapter's or holds more than one conversation; or the text has no token.
    """
    identity = identity_of(model)
    if is_disabled(model):
        raise ArgumentError("model: its memory is switched off here (memory_disabled), so nothing is written or read")
    if memory is not None and memory.batch_size != 1:
        raise ArgumentError(f"memory: got {memory.batch_size} rows, allowed 1; see select()")
    after = MemoryState.zeros(model) if memory is None else memory.clone()
    ids, segments = encode_text(tokenizer, text, identity.config)
    if not ids.shape[1]:
        raise ArgumentError(f"text: got {text!r}, which has no token")

    initial = {layer: state.detach().cpu().clone() for layer, state in after.items()}
    decoder = decoder_of(unwrap(model))
    device = input_device(model)
    segments = None if segments is None else segments.to(device)
    with capture_projections() as found:
        decoder(input_ids=ids.to(device), memory=after, segment_ids=segments, use_cache=False)
    if not found:
        raise ArgumentError(
            "model: nothing was seen of its forward, which is compiled; trace the model without compile"
        )

    layers = sorted(found[0])
    bias = [identity.memories[layer].gate_bias().detach().float().cpu() for layer in layers]
    start = torch.cat([initial[layer] for layer in layers])
    length = ids.shape[1]
    seen = replay(
        torch.cat([found[0][layer].float().cpu() for layer in layers]),
        torch.stack(bias),
        start,
        identity.config.rule,
        segment_ids=None if segments is None else segments[0].cpu(),
        frozen=after.frozen,
        keep_states=length <= KEPT_TOKENS and length * start.numel() <= KEPT_NUMBERS,
    )
    return Trace(
        tokens=tuple(token_pieces(tokenizer, ids[0].tolist())),
        token_ids=tuple(ids[0].tolist()),
        segment_ids=None if segments is None else tuple(segments[0].tolist()),
        layers=tuple(layers),
        frozen=after.frozen,
        initial=start,
        memory=after,
        **vars(seen),
    )


# --- tokens as text


def token_pieces(tokenizer, ids: Sequence[int]) -> list[str]:
    """What each token stands for in the text, its leading space included; never an empty string.

    A token that is a part of a character is shown as its bytes, ``⟨E2 82⟩``; special tokens by their names.
    """
    return [_piece(tokenizer, token) for token in ids]


def _piece(tokenizer, token: int) -> str:
    name = tokenizer.convert_ids_to_tokens(token)
    name = name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)
    if "▁" in name:
        # SentencePiece's mark of a space, which a token decoded alone loses at its start.
        return name.replace("▁", " ")
    text = tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if not text or _UNKNOWN in text or _BYTE.fullmatch(name):
        found = _bytes_of(name)
        if found is None:
            return text or name or f"⟨{token}⟩"
        try:
            return found.decode("utf-8") or name
        except UnicodeDecodeError:
            return f"⟨{found.hex(' ').upper()}⟩"
    return text


def _bytes_of(name: str) -> bytes | None:
    """The bytes of a token of a byte-level vocabulary, or of a byte-fallback token; None if it is neither."""
    single = _BYTE.fullmatch(name)
    if single:
        return bytes([int(single.group(1), 16)])
    if name and all(character in _BYTE_LEVEL for character in name):
        return bytes(_BYTE_LEVEL[character] for character in name)
    return None


# Character → byte of byte-level vocabularies, which write every byte as a character that can be seen (GPT-2).
_BYTE_LEVEL = {character: byte for byte, character in bytes_to_unicode().items()}
