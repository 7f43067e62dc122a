"""Valid inputs made wrong: bits, bytes and texts, and the structure of JSON, which random bytes never get behind."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

# Texts that are JSON for Python's reader, or nearly, and are no value that anybody expects.
DEPTHS = (20, 66, 101, 150, 300, 600, 800, 880, 930, 100_000)
NASTY = (
    "null true false 0 -1 1 2 1.5 -0.0 1e300 1e999 -1e999 NaN Infinity -Infinity 1e-320 2147483648 9223372036854775807 "
    "9223372036854775808 18446744073709551616 [] {} [[]] [{}] [null] [1,2] {\"\":null} {\"a\":{}} [\"a\"] \"\" \"a\" "
    "\"1\" \"NaN\" \"\\ud800\" \"\\u0000\" \"..\" \"../x\" \"~nobody-here/..\" \"~\" \"C:\\\\\" \"\\n\" \"<think>\" "
    "{\"role\":\"user\"} {\"type\":\"text\"} 01 tru ' \" , : ] }"
).split()  # fmt: skip
NASTY += [
    "1" + "0" * 400, "-" + "9" * 400, "9" * 4300, "9" * 5000, "1." + "3" * 5000, '"' + "a" * 5000 + '"',
    '"' + "\N{COMBINING ACUTE ACCENT}" * 300 + '"', '"\N{SUPERSCRIPT TWO}"', '"' + "7" * 5000 + '"',
    "[" + "0," * 3000 + "0]",
    *("[" * depth + "]" * depth for depth in DEPTHS), *('{"a":' * depth + "1" + "}" * depth for depth in DEPTHS),
]  # fmt: skip
TEXTS = (
    "", " ", "\n\n", "\0", "\ud800", "\udcff", "\ufeff", "\u2028", "\x1b[31m", "\r", "²", "٣", "。", "…", ". ", "!\"'»",
    "<think>", "</think>", "<|im_start|>", "<|im_end|>", "{0}", "{}", "%s", "{context}", "{{ 7 * 7 }}", "..",
    "~nobody-here/..",
    "session_", "answer:", "yes", "no", "1.", "{\"fluency\": 1}", "{" * 900, "[" * 900, "9" * 5000, "a" * 3000,
    "a b " * 700, "\N{COMBINING ACUTE ACCENT}" * 100, "1e999", "NaN", "-1", "2**63", "--overwrite", "--messages",
    "all", "tokens",
)  # fmt: skip
BYTES = (
    b"",
    b"\0",
    b"\xff" * 8,
    b"\xed\xa0\x80",
    b"\xef\xbb\xbf",
    b"\n",
    b"\r\n",
    b'"',
    b"{",
    b"\x80",
    b"PK\x03\x04",
    bytes(64),
)

# An operation is (kind, place, value): three numbers from 0 to 2³² − 1, whatever the input.
Operation = tuple[int, int, int]


class _Raw(str):
    """Text that stands in JSON as it is."""


class _Object(list):
    """A JSON object as its pairs, so that a key may stand there twice."""


def mutated(data: bytes, form: str, operations: Sequence[Operation], others: Sequence[bytes] = ()) -> bytes:
    """``data`` changed by each operation in turn.

    Args:
        form: ``json``; ``lines`` of JSON; ``head``: a line of JSON, then bytes; ``text``; ``bytes``.
        others: inputs of the same form, for splicing.
    """
    for operation in operations:
        data = _changed(data, form, operation, others)
    return data


def _changed(data: bytes, form: str, operation: Operation, others: Sequence[bytes]) -> bytes:
    kind, place, value = operation
    if form == "text":
        return _text(data, kind, place, value) if kind % 4 else _bytes(data, kind // 4, place, value, others)
    if form == "bytes" or kind % 8 == 0:
        return _bytes(data, kind // 8, place, value, others)
    if form == "json":
        return _json(data, kind // 8, place, value)
    lines = data.split(b"\n")
    if form == "head":
        head, *rest = lines
        return b"\n".join([_json(head, kind // 8, place, value), *rest])
    which = place % len(lines)
    if kind % 8 == 1:
        lines[which : which + 1] = [[], [lines[which]] * 2, [b""], [b"{}"], lines[: which + 1]][value % 5]
    else:
        lines[which] = _json(lines[which], kind // 8, place // 7, value)
    return b"\n".join(lines)


# --- bytes and texts


def _bytes(data: bytes, kind: int, place: int, value: int, others: Sequence[bytes]) -> bytes:
    at, changed = place % (len(data) + 1), bytearray(data)
    match kind % 8:
        case 0 if data:
            changed[at % len(data)] ^= 1 << value % 8
        case 1 if data:
            changed[at % len(data)] = value % 256
        case 2:
            del changed[at:]
        case 3:
            del changed[at : at + 1 + value % 64]
        case 4:
            changed[at:at] = BYTES[value % len(BYTES)]
        case 5:
            changed[at : at + 8] = (value * 0x9E3779B97F4A7C15 % 2**64).to_bytes(8, "little")
        case 6 if others:
            other = others[value % len(others)]
            changed[at:] = other[place % (len(other) + 1) :]
        case _:
            changed += changed[at : at + 1 + value % 4096]
    return bytes(changed)


def _text(data: bytes, kind: int, place: int, value: int) -> bytes:
    text = as_text(data)
    at, one = place % (len(text) + 1), TEXTS[value % len(TEXTS)]
    match kind // 4 % 4:
        case 0:
            text = text[:at] + one + text[at:]
        case 1:
            text = text[:at] + one + text[at + len(one) :]
        case 2:
            text = text[:at] + chr(value % 0x110000) + text[at + 1 :]
        case _:
            text = text[at:] + one * (1 + value % 3) + text[:at]
    return as_bytes(text)


def as_text(data: bytes) -> str:
    """Any bytes as a text, one with halves of surrogate pairs where they are no UTF-8."""
    try:
        return data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return data.decode("utf-8", "surrogateescape")


def as_bytes(text: str) -> bytes:
    """The other way round."""
    return text.encode("utf-8", "surrogatepass")


# --- JSON


def _json(data: bytes, kind: int, place: int, value: int) -> bytes:
    """JSON with one of its values, keys or pairs changed; what is none, or too deep, has bytes inserted."""
    try:
        return _json_changed([json.loads(data, object_pairs_hook=_Object, parse_constant=_Raw, parse_float=_Raw)],
                             kind, place, value)  # fmt: skip
    except (ValueError, RecursionError):
        return _bytes(data, 4, place, value, ())


def _json_changed(holder: list, kind: int, place: int, value: int) -> bytes:
    places = list(_places(holder))
    container, index = places[place % len(places)]
    match kind % 8:
        case 0 | 1 | 2 | 3:
            _put(container, index, _Raw(NASTY[value % len(NASTY)]))
        case 4:
            other, there = places[value % len(places)]
            _put(container, index, _copied(_get(other, there)))
        case 5 if len(container) > 1 or container is not holder:
            del container[index]
        case 6 if isinstance(container, _Object):
            key, kept = container[index]
            extra = (key, _Raw(NASTY[value % len(NASTY)])) if value % 2 else (TEXTS[value % len(TEXTS)], kept)
            container.insert(index + value % 2, extra)
        case _:
            found = _get(container, index)
            if isinstance(found, str) and not isinstance(found, _Raw):
                _put(container, index, as_text(_text(as_bytes(found), kind, place // 3, value)))
            elif isinstance(found, list) and found and not isinstance(found, _Object):
                found.insert(value % (len(found) + 1), _copied(found[value % len(found)]))
            else:
                _put(container, index, [found])
    return as_bytes(_dumped(holder[0]))


def _places(value: list) -> Any:
    """(container, index) of every value inside."""
    waiting = [value]
    while waiting:
        container = waiting.pop()
        for index in range(len(container)):
            yield container, index
            found = _get(container, index)
            if isinstance(found, list):
                waiting.append(found)


def _get(container: list, index: int) -> Any:
    return container[index][1] if isinstance(container, _Object) else container[index]


def _put(container: list, index: int, value: Any) -> None:
    container[index] = (container[index][0], value) if isinstance(container, _Object) else value


def _copied(value: Any) -> Any:
    """So that no list comes to hold itself."""
    if isinstance(value, _Object):
        return _Object((key, _copied(part)) for key, part in value)
    return [_copied(part) for part in value] if isinstance(value, list) else value


def _dumped(value: Any) -> str:
    if isinstance(value, _Raw):
        return str(value)
    if isinstance(value, _Object):
        return f"{{{', '.join(f'{json.dumps(key)}: {_dumped(part)}' for key, part in value)}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_dumped, value))}]"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 10**4000:
        return "0"
    return json.dumps(value)


def replaced(data: bytes, form: str, place: int, value: str) -> bytes:
    """The first JSON of an input with one of its values replaced by a text."""
    head, *rest = [data] if form == "json" else data.split(b"\n")
    holder = [json.loads(head, object_pairs_hook=_Object, parse_constant=_Raw, parse_float=_Raw)]
    places = list(_places(holder))[1:]
    _put(*places[place % len(places)], _Raw(value))
    return b"\n".join([as_bytes(_dumped(holder[0])), *rest])
