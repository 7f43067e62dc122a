"""bench's rooms import downwards, and no files of it in a circle."""

import ast
import graphlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Each may import only those before it, and its own files.
ROOMS = ("instrument", "speed", "memory recall serving evaluation", "life")
ROOMS += ("gpu executed compare", "report", "__main__")


def imports(path):
    """The files of bench that ``path`` imports, inside functions too."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or not (node.level or (node.module or "").split(".")[0] == "bench"):
            continue
        base = package[: len(package) - node.level + 1] if node.level else ()
        module = [*base, *(node.module or "").split(".")] if node.module else list(base)
        for name in [*module, ""], *([*module, alias.name] for alias in node.names):
            file = ROOT.joinpath(*name).with_suffix(".py") if name[-1] else ROOT.joinpath(*module).with_suffix(".py")
            if file.is_file():
                yield file


def room(path):
    name = path.relative_to(ROOT / "bench").parts[0].removesuffix(".py")
    return name, next(n for n, names in enumerate(ROOMS) if name in names.split())


def test_rooms_import_downwards_and_files_in_no_circle():
    files = [path for path in (ROOT / "bench").rglob("*.py") if path.name != "__init__.py"]
    graph = {path: set(imports(path)) for path in files}
    assert sum(map(len, graph.values())) > 100
    for path, others in graph.items():
        for (own, floor), (other, below) in ((room(path), room(other)) for other in others):
            assert own == other or below < floor, f"{path.relative_to(ROOT)} imports from {other}"
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError
