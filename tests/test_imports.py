"""What importing needs: neither Triton nor numba nor flash-attn, and no package that ``kernels/`` could shadow."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from deltamem_kernels.dispatch import operations

ROOT = Path(__file__).parent.parent

# An entry of None makes both import and find_spec say that there is no such package.
BLOCKED = """
import sys
for name in ("triton", "numba", "llvmlite", "flash_attn"):
    sys.modules[name] = None
"""

FORWARD = """
import torch
from transformers import AutoModelForCausalLM, Qwen3Config
import deltamem_fast
from deltamem_fast import MemoryState, patch_model
config = Qwen3Config(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                     num_attention_heads=2, num_key_value_heads=1, head_dim=16, pad_token_id=0)
model = patch_model(AutoModelForCausalLM.from_config(config).eval())
memory = MemoryState.zeros(model, 1)
with torch.no_grad():
    model(torch.tensor([[1, 2, 3]]), memory=memory)
    model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2, memory=memory)
assert memory[0].abs().max() > 0
from deltamem_kernels.dispatch import operations
print(operations("auto", torch.device("cpu")).__name__)
"""


def run(code, cwd=ROOT, **environment):
    import os

    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, env=os.environ | environment, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.strip()


def test_works_without_triton_numba_and_flash_attn(tmp_path):
    assert run(BLOCKED + FORWARD, tmp_path).endswith("deltamem_kernels.reference.ops")


def test_numba_is_taken_where_it_is_installed():
    pytest.importorskip("numba")
    assert operations("auto", torch.device("cpu")).__name__ == "deltamem_kernels.numba.ops"


def test_importing_does_not_import_triton_or_numba(tmp_path):
    packages = "deltamem_fast, deltamem_kernels, deltamem_kernels.rule"
    loaded = run(
        f"import sys, torch; before = set(sys.modules); import {packages}; print(sorted(set(sys.modules) - before))"
    )
    assert "'deltamem_kernels.rule'" in loaded
    assert "'numba" not in loaded and "'triton.language'" not in loaded


@pytest.mark.parametrize("place", (ROOT, None), ids=("repository root", "elsewhere"))
def test_kernels_does_not_shadow_the_package_of_that_name(place, tmp_path):
    # transformers imports the package ``kernels`` if it finds one; our folder of that name must not look like it
    code = """
from transformers.utils import is_kernels_available
import importlib.util
spec = importlib.util.find_spec("kernels")
print(is_kernels_available(), spec is not None and spec.origin is not None)
"""
    available, real = run(code, place or tmp_path).split()
    assert available == real


@pytest.mark.parametrize("place", (ROOT, None), ids=("repository root", "elsewhere"))
def test_an_installed_kernels_outranks_the_folder(place, tmp_path):
    package = tmp_path / "site" / "kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("name = 'the installed one'\n")
    code = "import kernels; print(kernels.name)"
    assert run(code, place or tmp_path, PYTHONPATH=str(tmp_path / "site")) == "the installed one"


def test_importing_the_package_takes_no_torch_and_every_public_name_is_there():
    """Who only stores memories, or prints a version, does not wait for torch."""
    code = """
import sys
import deltamem_fast
from deltamem_fast.storage import bank_store, snapshots
heavy = [name for name in ("torch", "transformers", "numpy") if name in sys.modules]
assert not heavy, heavy
assert set(deltamem_fast.__all__) <= set(dir(deltamem_fast))
for name in deltamem_fast.__all__:
    assert getattr(deltamem_fast, name) is not None
try:
    deltamem_fast.no_such_name
except AttributeError as error:
    print(error)
"""
    assert run(code) == "module 'deltamem_fast' has no attribute 'no_such_name'"


def test_of_the_storage_tensors_alone_needs_torch():
    names = {f"deltamem_fast.storage.{path.stem}" for path in (ROOT / "deltamem_fast/storage").glob("[a-z]*.py")}
    names.remove("deltamem_fast.storage.tensors")
    code = f"import sys, {', '.join(names)}; print(*sorted({{'torch', 'transformers', 'numpy'}} & set(sys.modules)))"
    assert run(code) == ""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (listed,) = (
        contract["source_modules"] for contract in contracts if "torch" in contract.get("forbidden_modules", ())
    )
    assert set(listed) == names, "the contract names each of them"
