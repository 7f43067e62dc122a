"""numba's cache on disk, which several processes write: nobody loads what another function was compiled to."""

import importlib
import sys

import pytest

pytest.importorskip("numba")
import numba
from numba.core.caching import IndexDataCacheFile

from deltamem_kernels.numba import machine

MODULE = """
from deltamem_kernels.numba.machine import njit

def adder(n):
    @njit("int64(int64)", cache=True)
    def add(x):
        return x + n
    return add
"""


@pytest.fixture
def adder(tmp_path, monkeypatch):
    (tmp_path / "adders.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "cache"))
    yield importlib.import_module("adders").adder
    del sys.modules["adders"]


def saved_at_the_same_time(adder, monkeypatch):
    """Two ranks' functions, saved by two processes of which each sees an empty index, and the first writes last."""
    late, save_data = [], IndexDataCacheFile._save_data
    with monkeypatch.context() as both:
        both.setattr(IndexDataCacheFile, "_load_index", lambda self: {})
        both.setattr(IndexDataCacheFile, "_save_data", lambda self, *given: late.append((self, given)))
        adder(1)
        both.setattr(IndexDataCacheFile, "_save_data", save_data)
        adder(2)
    for files, given in late:
        save_data(files, *given)
    assert late


def test_two_processes_that_write_at_the_same_time(adder, tmp_path, monkeypatch):
    saved_at_the_same_time(adder, monkeypatch)
    assert [adder(n)(10) for n in (1, 2)] == [11, 12]
    assert len(list((tmp_path / "cache").rglob("*.nbc"))) == 2


def test_that_numbas_own_files_would_be_mixed_up(adder, monkeypatch):
    """So that the test above can fail; if this one does, numba has mended it."""
    monkeypatch.setattr(machine._KeyedFiles, "save", IndexDataCacheFile.save)
    saved_at_the_same_time(adder, monkeypatch)
    assert [adder(n)(10) for n in (1, 2)] == [11, 11]


def test_what_was_saved_is_loaded(adder, monkeypatch):
    adder(3)
    monkeypatch.setattr(numba.core.caching.IndexDataCacheFile, "save", None)  # nothing is to be compiled again
    monkeypatch.setattr(machine._KeyedFiles, "save", None)
    assert adder(3)(1) == 4


def test_files_of_an_older_source_go(adder, tmp_path):
    adder(1)
    (index,) = (tmp_path / "cache").rglob("*.nbi")
    (old,) = index.parent.glob("*.nbc")
    index.unlink()  # as one that another source's stamp makes nothing of
    adder(2)
    assert not old.exists() and len(list(index.parent.glob("*.nbc"))) == 1
