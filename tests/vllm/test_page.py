"""docs/vllm.md's Python runs as it stands there, on a small local model, with texts."""

import re
import sys

from deltamem_fast import MemoryBank
from deltamem_fast.recall.weights import find_weights
from tests.support import GOLDEN

PAGE = GOLDEN.parents[1] / "docs" / "vllm.md"


def test_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "llvmlite.binding.ffi", raising=False)  # as in engines.engine
    shipped = find_weights()
    [source] = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    for name, local in (
        ("Qwen/Qwen3-4B-Instruct-2507", shipped.backbone),
        ("declare-lab/delta-mem_qwen3_4b-instruct", shipped.adapters["msw"]),
    ):
        assert f'"{name}"' in source
        source = source.replace(f'"{name}"', f'"{local}"')
    names: dict = {"__name__": "page"}
    exec(compile(source, "docs/vllm.md", "exec"), names)
    assert [output.prompt for output in names["outputs"]] == ["What is my name?"] * 2
    with MemoryBank(tmp_path / "users.sqlite", names["model"]) as bank:
        assert [entry.id for entry in bank.list()] == ["ada", "ben"]
        gathered = bank.gather(["ada", "ben"])
        assert all((gathered[i] == names["memory"][i]).all() for i in gathered)
        assert not (gathered[0][0] == gathered[0][1]).all()
    names["llm"].llm_engine.engine_core.shutdown()
