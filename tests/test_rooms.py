"""What import-linter and ruff do not see of the directions between files: private names taken from another file."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(path for room in ("deltamem_fast", "kernels", "bench") for path in (ROOT / room).rglob("*.py"))


def private_imports(source):
    """(line, name) of each private name that is imported from a file of this project."""
    return [
        (node.lineno, alias.name)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and (node.level or node.module.partition(".")[0].startswith("deltamem_"))
        for alias in node.names
        if alias.name.startswith("_") and not alias.name.startswith("__")
    ]


def test_a_private_import_is_found():
    assert private_imports("def f():\n    from .loops import _PART, whole\n") == [(2, "_PART")]
    assert private_imports("from deltamem_fast.model.cache import _FED") == [(1, "_FED")]
    assert private_imports("from torch import _dynamo\nfrom ..version import __version__") == []


def test_private_names_stay_in_their_file():
    found = {str(path.relative_to(ROOT)): private_imports(path.read_text()) for path in FILES}
    assert FILES and {name: names for name, names in found.items() if names} == {}


@pytest.mark.parametrize("room", ("deltamem_fast", "kernels/deltamem_kernels"))
def test_every_room_says_what_it_is_for(room):
    folders = [path for path in (ROOT / room).rglob("*") if path.is_dir() and any(path.glob("*.py"))]
    silent = [path.name for path in folders if not ast.get_docstring(ast.parse((path / "__init__.py").read_text()))]
    assert folders and silent == []
