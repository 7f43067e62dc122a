"""The memory that a request brings along, as its sampling parameters carry it; needs neither vLLM nor torch.

A state is small (9,216 bytes for Qwen3-4B with the released recipe), so it travels with the request: as base64 of its
float32 numbers, little-endian, layer by layer in ascending order. vLLM hands ``SamplingParams.extra_args`` (over HTTP:
``vllm_xargs``) to every worker as they are, and again when a preempted request resumes.
"""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ..arguments import check_choice, check_integer, shown
from ..errors import ArgumentError

STATE, MODE, KEY, FIRST = "delta_mem_state", "delta_mem_mode", "delta_mem_key", "delta_mem_first"
MODES = ("write", "read", "none")
_MOST_KEY = 200


class Given(NamedTuple):
    """A request's memory.

    Attributes:
        mode: ``write``: read and written, token by token. ``read``: read alone. ``none``: the bare model.
        state: float32 [L, H, r, r], what it starts from; None: zeros.
        key: under which its last state is kept until it is taken; None: nobody will.
        first: with ``write``, how many tokens at its beginning are read alone, as with ``read``: what a memory has
            read before, and is in sight again.
    """

    mode: str
    state: np.ndarray | None
    key: str | None
    first: int = 0


def arguments_of(
    state: np.ndarray | None, mode: str = "write", key: str | None = None, first: int = 0
) -> dict[str, str | int]:
    """A request's memory as ``extra_args`` or ``vllm_xargs`` carry it.

    Args:
        state: float32 [L, H, r, r], the layers that have a memory in ascending order; None: zeros.
        mode: see ``Given``.
        key, first: see ``Given``; only with ``write``.

    Raises:
        ValueError: an unknown mode, a key or a first token without ``write``, a state that is not finite.
    """
    found: dict[str, str | int] = {MODE: mode}
    if state is not None:
        found[STATE] = base64.b64encode(np.ascontiguousarray(state, "<f4").tobytes()).decode("ascii")
    if key is not None:
        found[KEY] = key
    if first:
        found[FIRST] = first
    check_arguments(found)
    return found


def salt_of(arguments: Mapping[str, Any] | None) -> str | None:
    """The ``cache_salt`` that a request with this memory needs, so that its prefixes are nobody else's.

    None for one that starts from zeros and writes, as a request that says nothing does. Others have keys and values
    of their own for the same tokens; whoever starts from the same state in the same mode may share them.
    """
    mode, first = (arguments or {}).get(MODE, "write"), (arguments or {}).get(FIRST, 0)
    if not arguments or (STATE not in arguments and mode == "write" and not first):
        return None
    return _salt(mode, arguments.get(STATE, ""), first)


@functools.lru_cache(maxsize=1024)
def _salt(mode: str, state: str, first: int) -> str:
    return f"delta-mem:{hashlib.sha256(f'{mode}:{first}:{state}'.encode()).hexdigest()}"


def check_arguments(arguments: Mapping[str, Any] | None, shape: tuple[int, int, int, int] | None = None) -> None:
    """Raise ValueError if a request's memory is not one; ``shape`` [L, H, r, r] is what a state has to have."""
    read_arguments(arguments, shape)


def read_arguments(arguments: Mapping[str, Any] | None, shape: tuple[int, int, int, int] | None = None) -> Given | None:
    """What a request's arguments say of its memory; None: nothing. Errors as of ``check_arguments``."""
    if not arguments or not any(name in arguments for name in (STATE, MODE, KEY, FIRST)):
        return None
    for name in (STATE, MODE, KEY):
        if name in arguments and not isinstance(arguments[name], str):
            raise ArgumentError(f"{name}: got {shown(arguments[name])}, allowed a string")
    mode, key, state = arguments.get(MODE, "write"), arguments.get(KEY), arguments.get(STATE)
    first = check_integer(arguments.get(FIRST, 0), FIRST, 0)
    check_choice(mode, MODE, MODES)
    if first and mode != "write":
        raise ArgumentError(f"{FIRST}: got {first} with {MODE} {mode!r}, allowed with 'write'")
    if key is not None and not (0 < len(key) <= _MOST_KEY and mode == "write"):
        raise ArgumentError(
            f"{KEY}: got one of {len(key)} characters with {MODE} {mode!r}, allowed 1 to {_MOST_KEY} characters, with "
            "'write'"
        )
    if state is not None and mode == "none":
        raise ArgumentError(f"{STATE}: got one with {MODE} 'none', allowed with 'write' and 'read'")
    return Given(mode, None if state is None else _read_state(state, shape), key, first)


def _read_state(text: str, shape: tuple[int, int, int, int] | None) -> np.ndarray:
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ArgumentError(f"{STATE}: got what is no base64 ({error}), allowed that of float32 numbers") from error
    size = 4 if shape is None else 4 * int(np.prod(shape))
    if len(data) % 4 or (shape is not None and len(data) != size):
        allowed = "a multiple of 4" if shape is None else f"{size} ({' × '.join(map(str, shape))} float32 numbers)"
        raise ArgumentError(f"{STATE}: got {len(data)} bytes, allowed {allowed}")
    state = np.frombuffer(data, "<f4").astype(np.float32)
    if not np.isfinite(state).all():
        raise ArgumentError(f"{STATE}: got NaN or Inf, allowed finite numbers")
    return state if shape is None else state.reshape(shape)
