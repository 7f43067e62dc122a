"""Which backend runs where a package is missing, broken, or cannot keep what it compiled."""

import importlib
import inspect
import logging
import sys

import pytest
import torch
from support import tiny_model

import deltamem_fast
import deltamem_kernels.numba
from deltamem_fast import MemoryState, patch_model
from deltamem_fast.errors import ArgumentError, DeltaMemError, MissingPackageError
from deltamem_kernels import dispatch as backends
from deltamem_kernels.dispatch import BACKENDS, Operators, installed, resolve_backend, why_unusable

NUMBA_MODULES = ("ops", "backward", "heads", "loops", "recurrence", "rows", "threads")
needs_numba = pytest.mark.skipif(not installed("numba"), reason="numba is not installed")


@pytest.fixture
def undecided(monkeypatch):
    """Nothing was decided or imported yet; what is decided here is forgotten afterwards."""
    for name in NUMBA_MODULES:
        monkeypatch.delitem(sys.modules, f"deltamem_kernels.numba.{name}", raising=False)
        monkeypatch.delattr(deltamem_kernels.numba, name, raising=False)
    monkeypatch.setattr(backends, "loaded", {})
    monkeypatch.setattr(backends, "_said", set())
    why_unusable.cache_clear()
    yield monkeypatch
    why_unusable.cache_clear()


def fails_to_import(monkeypatch, module, error):
    """Importing ``module`` raises ``error`` from now on."""

    class Finder:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == module:
                raise error

    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_every_backend_has_the_operators(backend):
    if backend != "reference":
        pytest.importorskip(backend)
    ops = importlib.import_module(f"deltamem_kernels.{backend}.ops")
    contract = {
        name: method for name, method in vars(Operators).items() if inspect.isfunction(method) and name[0] != "_"
    }
    assert set(contract) == {"scan", "step", "read", "steer", "delta", "steer_heads_", "decode_", "workspace"}
    for name, method in contract.items():
        wanted = inspect.signature(method).parameters
        found = inspect.signature(getattr(ops, name)).parameters
        kept = {n: (p.kind, p.default) for n, p in found.items() if n in wanted}
        assert list(kept.items()) == [(n, (p.kind, p.default)) for n, p in wanted.items()], name
        own = [p for n, p in found.items() if n not in wanted]
        assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in own), name


@needs_numba
@pytest.mark.parametrize("error", [ImportError("Numba needs NumPy 2.2 or less"), OSError("libllvmlite.so: bad ELF")])
def test_auto_goes_on_without_a_numba_that_cannot_be_imported(undecided, caplog, error):
    fails_to_import(undecided, "deltamem_kernels.numba.ops", error)
    with caplog.at_level(logging.WARNING, "deltamem_fast"):
        assert resolve_backend("auto", "cpu") == "reference"
        assert resolve_backend("auto", "cpu") == "reference"
    (record,) = caplog.records
    assert str(error) in record.getMessage() and "reference" in record.getMessage()
    model = patch_model(tiny_model())
    assert model(torch.tensor([[5, 6]]), memory=MemoryState.zeros(model)).logits.isfinite().all()
    bare = tiny_model()
    with pytest.raises(MissingPackageError, match="backend: got 'numba', but.*" + str(error)[:12]):
        patch_model(bare, backend="numba")
    assert not deltamem_fast.is_patched(bare)


@needs_numba
def test_auto_goes_on_without_a_numba_that_has_no_place_for_its_cache(undecided, caplog):
    from numba.core.caching import CacheImpl

    undecided.setattr(CacheImpl, "_locator_classes", [])  # as where no directory can be written
    with caplog.at_level(logging.WARNING, "deltamem_fast"):
        assert resolve_backend("auto", "cpu") == "reference"
    assert "set NUMBA_CACHE_DIR" in caplog.text
    with pytest.raises(MissingPackageError, match="NUMBA_CACHE_DIR"):
        resolve_backend("numba", "cpu")


@needs_numba
def test_auto_goes_on_without_a_numba_that_was_told_not_to_compile(undecided, caplog):
    from numba import config

    undecided.setattr(config, "DISABLE_JIT", 1)
    with caplog.at_level(logging.WARNING, "deltamem_fast"):
        assert resolve_backend("auto", "cpu") == "reference"
    assert "NUMBA_DISABLE_JIT" in caplog.text
    with pytest.raises(MissingPackageError, match="NUMBA_DISABLE_JIT"):
        resolve_backend("numba", "cpu")


@needs_numba
def test_a_cache_that_fails_later_fails_no_call(monkeypatch, tmp_path, caplog):
    from numba import config

    from deltamem_kernels.numba.machine import _warn_of_cache, njit

    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path))
    _warn_of_cache.cache_clear()
    (tmp_path / "one.py").write_text("def add(a):\n    return a + 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    function = importlib.import_module("one").add

    def full(self, name, data):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, caplog.at_level(logging.WARNING, "deltamem_fast"):
        patched.setattr("numba.core.caching.IndexDataCacheFile._save_data", full)
        assert njit(cache=True)(function)(1) == 2
    assert "No space left on device" in caplog.text
    assert njit(cache=True)(function)(1) == 2
    for path in tmp_path.rglob("*.nb[ic]"):
        path.write_bytes(path.read_bytes()[:20])
    caplog.clear()
    with caplog.at_level(logging.WARNING, "deltamem_fast"):
        assert njit(cache=True)(function)(1) == 2
    assert "cannot be read" in caplog.text
    # What was damaged has been written anew.
    again = njit(cache=True)(function)
    assert again(1) == 2 and sum(again.stats.cache_hits.values()) == 1


def test_auto_goes_on_without_a_triton_that_cannot_be_imported(undecided, caplog):
    undecided.setattr(backends, "installed", lambda package: True)
    undecided.delattr("deltamem_kernels.triton.ops", raising=False)
    undecided.setitem(sys.modules, "deltamem_kernels.triton.ops", None)
    with caplog.at_level(logging.WARNING, "deltamem_fast"):
        assert resolve_backend("auto", "cuda") == "reference"
    assert "triton cannot be used here" in caplog.text
    with pytest.raises(MissingPackageError, match="got 'triton', but the package triton cannot be used here"):
        resolve_backend("triton", "cuda")


def test_a_missing_package_is_no_warning(undecided, caplog):
    undecided.setattr(backends, "installed", lambda package: False)
    with caplog.at_level(logging.WARNING, "deltamem_fast"):
        assert resolve_backend("auto", "cpu") == resolve_backend("auto", "cuda") == "reference"
    assert not caplog.records
    with pytest.raises(MissingPackageError, match="numba is not installed"):
        resolve_backend("numba", "cpu")


@pytest.mark.parametrize("backend", ["", "cuda", None, 3, ["numba"], True])
def test_an_unknown_backend(backend):
    with pytest.raises(ArgumentError, match="backend: got .*allowed auto, triton"):
        resolve_backend(backend, "cpu")
    with pytest.raises(DeltaMemError, match="backend"):
        patch_model(tiny_model(), backend=backend)
