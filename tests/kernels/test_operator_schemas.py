"""Registered operators keep their names and schemas: exported and compiled programs name them."""

import importlib
from pathlib import Path

import pytest
import torch

EXPECTED = Path(__file__).with_name("operator_schemas.txt").read_text().splitlines()


@pytest.mark.parametrize("backend, namespace", [("triton", "deltamem"), ("numba", "deltamem_fast")])
def test_schemas_are_as_written_down(backend, namespace):
    pytest.importorskip(backend)
    importlib.import_module(f"deltamem_kernels.{backend}.ops")
    names = {name.split(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith(f"{namespace}::")}
    found = [str(schema) for name in sorted(names) for schema in torch._C._jit_get_schemas_for_operator(name)]
    assert found == [line for line in EXPECTED if line.startswith(f"{namespace}::")]
