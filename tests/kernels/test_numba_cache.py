"""numba's cache on disk, which several processes write: nobody loads what another function was compiled to."""

import importlib
import os
import subprocess
import sys

import pytest

pytest.importorskip("numba")
import numba
from numba.core.caching import IndexDataCacheFile

from deltamem_kernels.numba import machine
from deltamem_kernels.numba.backward import backward_loops
from deltamem_kernels.numba.blocks import block_loop
from deltamem_kernels.numba.loops import scan_loops
from deltamem_kernels.numba.rows import row_loop

MODULE = """
from deltamem_kernels.numba.machine import njit

def adder(n):
    @njit("int64(int64)", cache=True)
    def add(x):
        return x + int(n)
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
    """Two functions of one name, saved by two processes: each sees an empty index, and the first writes last."""
    late, save_data = [], IndexDataCacheFile._save_data
    with monkeypatch.context() as both:
        both.setattr(IndexDataCacheFile, "_load_index", lambda self: {})
        both.setattr(IndexDataCacheFile, "_save_data", lambda self, *given: late.append((self, given)))
        adder(1.0)
        both.setattr(IndexDataCacheFile, "_save_data", save_data)
        adder(2.0)
    for files, given in late:
        save_data(files, *given)
    assert late


def test_two_processes_that_write_at_the_same_time(adder, tmp_path, monkeypatch):
    saved_at_the_same_time(adder, monkeypatch)
    assert [adder(n)(10) for n in (1.0, 2.0)] == [11, 12]
    assert len(list((tmp_path / "cache").rglob("*.nbc"))) == 2


def test_that_numbas_own_files_would_be_mixed_up(adder, monkeypatch):
    """So that the test above can fail; if this one does, numba has mended it."""
    monkeypatch.setattr(machine._KeyedFiles, "save", IndexDataCacheFile.save)
    saved_at_the_same_time(adder, monkeypatch)
    assert [adder(n)(10) for n in (1.0, 2.0)] == [11, 11]


COMPILES, CALLS_BOTH = (
    "import adders; adders.adder({n})",
    """
import ctypes, adders
from numba.core.types.function_type import CompileResultWAP

for function in [adders.adder(n) for n in (1, 2)]:  # both in the cache
    (compiled,) = function.overloads.values()
    print(ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(CompileResultWAP(compiled).address)(10))
""",
)


def test_c_calls_the_function_that_it_asks_for_whoever_compiled_it(tmp_path):
    """By its address, as threads do: numba gives the first function of each process the same number."""
    (tmp_path / "adders.py").write_text(MODULE)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join((str(tmp_path), *sys.path)),
        "NUMBA_CACHE_DIR": str(tmp_path / "cache"),
    }
    for program in (COMPILES.format(n=1), COMPILES.format(n=2), CALLS_BOTH):
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["11", "12"]


@pytest.mark.parametrize("rank", [8, 3])
def test_every_loop_has_its_rank_in_its_name(rank):
    loops = [*vars(scan_loops(rank)).values(), *vars(backward_loops(rank)).values(), row_loop(rank), block_loop(rank)]
    assert len(loops) == 6 and all(f".rank_{rank}" in loop.__qualname__ for loop in loops)


def test_what_was_saved_is_loaded(adder, monkeypatch):
    adder(3)
    monkeypatch.setattr(numba.core.caching.IndexDataCacheFile, "save", None)  # nothing is to be compiled again
    monkeypatch.setattr(machine._KeyedFiles, "save", None)
    assert adder(3)(1) == 4


def test_files_of_an_older_source_go(adder, tmp_path):
    adder(1.0)
    (index,) = (tmp_path / "cache").rglob("*.nbi")
    (old,) = index.parent.glob("*.nbc")
    index.unlink()  # as one that another source's stamp makes nothing of
    adder(2.0)
    assert not old.exists() and len(list(index.parent.glob("*.nbc"))) == 1
