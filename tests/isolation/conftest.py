"""The serving tests' helpers are used here, too; and what says that a word was not told."""

import logging
import sys
from pathlib import Path

import pytest
from leaks import WORD

sys.path.append(str(Path(__file__).resolve().parents[1] / "serving"))


@pytest.fixture
def silent(caplog, capfd):
    """At the end: the word was neither logged, at any level, nor printed."""
    caplog.set_level(logging.DEBUG)
    for name in ("deltamem_fast", "transformers"):  # commands, and transformers, hand nothing on to the root
        caplog.set_level(logging.DEBUG, name)
        logging.getLogger(name).addHandler(caplog.handler)
    yield
    for name in ("deltamem_fast", "transformers"):
        logging.getLogger(name).removeHandler(caplog.handler)
    said = capfd.readouterr()
    # caplog.records are the teardown's own by now.
    logged = "\n".join(logging.Formatter().format(record) for record in caplog.get_records("call"))
    assert WORD not in logged
    assert WORD not in said.out and WORD not in said.err
