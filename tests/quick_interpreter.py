"""Triton's interpreter patches triton.language at every call of a device function; once a launch is enough.

Each time it looks through all members of the language, which was a third of what the interpreted tests took.
"""

import functools


def install():
    """For a process that has TRITON_INTERPRET=1; a Triton whose interpreter is another one stays as it is."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch, scope_type = (getattr(interpreter, name, None) for name in ("_patch_lang", "_LangPatchScope"))
    if patch is None or scope_type is None or hasattr(patch, "once"):
        return
    patched = set()

    @functools.cache
    def modules(fn):
        found = fn.__globals__.values()
        return frozenset(name for name, lang in (("tl", tl), ("core", tl.core)) if any(v is lang for v in found))

    def once(fn):
        if modules(fn) <= patched:
            return scope_type()
        scope, outermost = patch(fn), not patched
        patched.update(modules(fn))
        if outermost:
            restore = scope.restore
            scope.restore = lambda: (patched.clear(), restore())
        return scope

    once.once = True
    interpreter._patch_lang = once
