"""Tokens as text that can be shown, one by one."""

from __future__ import annotations

import re
from collections.abc import Sequence

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_UNKNOWN = "\N{REPLACEMENT CHARACTER}"


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


def _byte_level() -> dict[str, int]:
    """Character → byte of byte-level vocabularies, which write every byte as a character that can be seen (GPT-2)."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + n): byte for n, byte in enumerate(hidden)}


_BYTE_LEVEL = _byte_level()
