"""Whether an installed package works: it is imported from where it was installed, and a small model is patched."""

from __future__ import annotations

from pathlib import Path

from .steps import clean_environment, run

# Run in a folder of its own, with the interpreter that the package was installed for.
_USE = """
import importlib.metadata, importlib.resources, pathlib, sys
import torch
from transformers import AutoModelForCausalLM, Qwen3Config
import deltamem_fast, deltamem_kernels
for module in (deltamem_fast, deltamem_kernels):
    found = pathlib.Path(module.__file__).resolve()
    assert found.is_relative_to(pathlib.Path(sys.argv[1]).resolve()), found
assert importlib.metadata.version("deltamem-fast") == deltamem_fast.__version__ == sys.argv[2]
assert importlib.resources.files("deltamem_fast").joinpath("data/recall/backbone/config.json").is_file()
config = Qwen3Config(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                     num_attention_heads=2, num_key_value_heads=1, head_dim=16, pad_token_id=0)
model = deltamem_fast.patch_model(AutoModelForCausalLM.from_config(config).eval(), backend="reference")
memory = deltamem_fast.MemoryState.zeros(model, 1)
with torch.no_grad():
    model(torch.tensor([[1, 2, 3]]), memory=memory)
assert memory[0].abs().max() > 0
"""


def try_installed(python: str | Path, site: Path, version: str, *, cwd: Path, on_path: bool = False) -> None:
    """Use the package that is installed below ``site``.

    Args:
        version: that it has to have.
        cwd: a folder outside the repository.
        on_path: ``site`` is a folder of packages alone (``pip install --target``), not of ``python``'s environment.

    Raises:
        StepFailed: it is another one, or does not work.
    """
    env = clean_environment(**({"PYTHONPATH": str(site)} if on_path else {}))
    run(python, "-c", _USE, site, version, cwd=cwd, env=env)
