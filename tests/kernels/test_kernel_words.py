"""Every Triton kernel names the reference function that it equals, or whose gradient it gives."""

import ast
import re
from pathlib import Path

import pytest

import deltamem_kernels
from deltamem_kernels.reference import heads, recurrence

FILES = sorted((Path(deltamem_kernels.__file__).parent / "triton").glob("*.py"))
KERNELS = {
    node.name: ast.get_docstring(node) or ""
    for path in FILES
    for node in ast.parse(path.read_text("utf-8")).body
    if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
}


@pytest.mark.parametrize("kernel", sorted(KERNELS))
def test_a_kernel_names_its_reference(kernel):
    named = re.findall(r"``reference\.(recurrence|heads)\.(\w+)``", KERNELS[kernel])
    assert named, KERNELS[kernel]
    for module, function in named:
        assert callable(getattr({"recurrence": recurrence, "heads": heads}[module], function))


def test_all_kernels_are_seen():
    assert len(KERNELS) == 17
