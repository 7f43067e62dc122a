"""Wrote ``session_v1`` and ``session_v1_small`` here, run in the version whose sessions had format version 1.

    PYTHONPATH=.:kernels:tests:tests/session python session_v1.py TARGET

The session is ``old_session`` of session_support.py (then in tests/session), after one turn has left its
context; the small one is without its cache.
"""

import shutil
import sys
from pathlib import Path

from session_support import tiny_session
from tokenizers_for_tests import chatml_tokenizer

session = tiny_session(
    chatml_tokenizer(),
    context_turns=1,
    system="Be kind.",
    template={"enable_thinking": False},
    generation={"max_new_tokens": 3, "do_sample": False},
)
for text in ("Ada?", "And Rex?"):
    session.answer(text)
for name, cache in (("session_v1", True), ("session_v1_small", False)):
    directory = session.save(Path(sys.argv[1]) / name, cache=cache)
    (directory / ".lock").unlink()
shutil.rmtree(Path(sys.argv[1]) / "__pycache__", ignore_errors=True)
