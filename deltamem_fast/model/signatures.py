"""What forwards say of themselves: whether they hand keyword arguments on, and what they call the cache."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Mapping
from typing import Any


@functools.cache
def why_not_handed_on(forward: Callable, attribute: str = "") -> str:
    """Why keyword arguments of a class's ``forward`` do not reach a module that it calls, or "".

    Args:
        forward: the function.
        attribute: the module's name on ``self``; "" = the layers that it loops over.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(forward))))
    except (OSError, TypeError, SyntaxError):  # no source here: the first forward shows
        return ""
    names = {
        name.id
        for loop in ast.walk(tree)
        if isinstance(loop, ast.For)
        for name in ast.walk(loop.target)
        if isinstance(name, ast.Name)
    }
    calls = [call for call in ast.walk(tree) if isinstance(call, ast.Call) and _is_of(call.func, attribute, names)]
    if not calls or any(keyword.arg is None for call in calls for keyword in call.keywords):
        return ""
    return f"hands no keyword arguments on to its {attribute or 'layers'}"


def cache_name(forward: Callable) -> str:
    """What a forward calls the cache that it takes: ``past_key_values``, and since transformers 5.24 ``cache``."""
    names = inspect.signature(forward).parameters
    return "cache" if "cache" in names and "past_key_values" not in names else "past_key_values"


def given_cache(arguments: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a forward or of ``generate``, under either name, or None."""
    cache = arguments.get("cache")  # counts alone where both are given
    return arguments.get("past_key_values") if cache is None else cache


def given_tokens(arguments: Mapping[str, Any]) -> Any:
    """The ids [B, T] or embeddings [B, T, D] among the arguments of a forward, or None."""
    ids = arguments.get("input_ids")
    return arguments.get("inputs_embeds") if ids is None else ids


def _is_of(function: ast.expr, attribute: str, names: set[str]) -> bool:
    if not attribute:
        return isinstance(function, ast.Name) and function.id in names
    return isinstance(function, ast.Attribute) and function.attr == attribute
