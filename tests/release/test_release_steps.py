"""Steps that pass, fail and are not run, what the release and the night make of them, and what a cell asks pip for."""

import os
import sys

import pytest

from release import nightly
from release.check import REQUIRED, check_bill, check_demo
from release.steps import FAILED, NOT_RUN, PASSED, ROOT, StepFailed, Steps, clean_environment, run, table


def failing():
    raise StepFailed("first line\nmiddle\nlast | line\n")


@pytest.fixture
def steps():
    return Steps(say=lambda text: None)


def test_a_step_that_needs_one_that_failed_is_not_run(steps):
    assert steps.run("one", lambda: "found")
    assert not steps.run("two", failing, ["one"])
    assert not steps.run("three", lambda: pytest.fail("it was run"), ["one", "two"])
    assert not steps.run("four", lambda: pytest.fail("it was run"), ["nobody"])
    assert [row.outcome for row in steps.rows] == [PASSED, FAILED, NOT_RUN, NOT_RUN]
    assert not steps.passed
    lines = table(steps.rows).splitlines()
    assert lines[3].endswith("| first line; last \\| line |") and lines[4].endswith("| needs two |")


def test_no_step_is_no_pass(steps):
    assert not steps.passed and nightly.status(steps) == 3
    steps.run("one", lambda: "")
    assert steps.passed and nightly.status(steps) == 0
    steps.skip("two", "no interpreter")
    assert not steps.passed and nightly.status(steps) == 3
    steps.run("three", failing)
    assert nightly.status(steps) == 1


def test_commands(tmp_path):
    assert run(sys.executable, "-c", "print('said')", cwd=tmp_path) == "said\n"
    with pytest.raises(StepFailed, match=r"exit status 3\nreason"):
        run(sys.executable, "-c", "import sys; sys.exit(print('reason') or 3)", cwd=tmp_path)
    with pytest.raises(StepFailed, match="not done after 0 s"):
        run(sys.executable, "-c", "import time; time.sleep(60)", cwd=tmp_path, timeout=0.2)
    with pytest.raises(StepFailed, match="nothing-there"):
        run(tmp_path / "nothing-there", cwd=tmp_path)


def test_nothing_leads_a_clean_environment_into_this_checkout(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert "PYTHONPATH" not in clean_environment() and clean_environment(A="1")["A"] == "1"
    code = "import os; print('PYTHONPATH' in os.environ)"
    assert run(sys.executable, "-c", code, cwd=tmp_path) == "False\n"


def bill(**changed):
    parts = dict.fromkeys(REQUIRED, "1.0") | changed
    return {"specVersion": "1.6", "components": [{"name": n, "version": v} for n, v in parts.items() if v]}


def test_bills_of_materials():
    assert check_bill(bill(), "1.0") == f"CycloneDX 1.6, {len(REQUIRED)} components"
    with pytest.raises(StepFailed, match="lacks torch"):
        check_bill(bill(torch=None), "1.0")
    with pytest.raises(StepFailed, match="deltamem-fast 1.0, built was 1.1"):
        check_bill(bill(), "1.1")


def test_what_the_demo_says():
    talk = {"told": []}
    assert check_demo({"checks": {"recall": True}, "backend": "numba", "talk": talk}).startswith("1 claims hold")
    for checks in ({"recall": True, "revised": False}, {}):
        with pytest.raises(StepFailed, match="does not hold: (revised|there are no checks)"):
            check_demo({"checks": checks, "backend": "numba", "talk": talk})
    with pytest.raises(StepFailed, match="no SmolLM2: not installed"):
        check_demo({"checks": {"recall": True}, "backend": "numba", "talk": {"absent": "not installed"}})


# --- the night


def test_the_floors_are_those_of_setup_py():
    wanted = nightly.declared((ROOT / "setup.py").read_text(encoding="utf-8"))
    assert any(line.startswith("torch>=") for line in wanted)
    oldest = nightly.requirements(nightly.CELLS[0], wanted)
    newest = nightly.requirements(nightly.CELLS[1], wanted)
    for name in nightly.PINNED:
        assert sum(line.startswith(f"{name}==") for line in oldest) == 1
        assert not any(line.startswith(f"{name}==") for line in newest)
    assert set(wanted) <= set(oldest) and set(wanted) <= set(newest)
    cell = nightly.Cell("one", "3.11", (("torch", nightly.OLDEST),), ("numpy<2.4",))
    found = nightly.requirements(cell, ["torch>=2.11", "transformers>=5.10,<6"])
    assert found == ["torch>=2.11", "transformers>=5.10,<6", "torch==2.11.*", *nightly.TEST_TOOLS, "numpy<2.4"]


def test_every_corner_has_a_cell():
    assert len({cell.name for cell in nightly.CELLS}) == len(nightly.CELLS)
    for age in (nightly.OLDEST, nightly.NEWEST):
        assert tuple((name, age) for name in nightly.PINNED) in {cell.versions for cell in nightly.CELLS}
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    lowest = min((cell.python for cell in nightly.CELLS), key=lambda version: int(version.partition(".")[2]))
    assert f'python_requires=">={lowest}"' in text
    page = (ROOT / "docs/compatibility.md").read_text(encoding="utf-8")
    assert [cell.name for cell in nightly.CELLS if f"| `{cell.name}` | {cell.python} |" not in page] == []


def test_the_tests_of_a_cell_are_there():
    assert [path for path in nightly.TESTS if not (ROOT / path).exists()] == []


def test_deprecations_are_errors_but_for_modules_that_are_named():
    filters = nightly.warning_filters()
    assert filters[:3] == ["error::DeprecationWarning", "error::PendingDeprecationWarning", "error::FutureWarning"]
    for ignored in nightly.IGNORED:
        assert ignored.module and ignored.why and not ignored.module.startswith(("deltamem_", "tests", "bench"))


def test_interpreters(monkeypatch, tmp_path):
    own = f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert nightly.interpreter(own) is not None
    shim = tmp_path / "python3.99"
    shim.write_text("#!/bin/sh\nexit 127\n")
    shim.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert nightly.interpreter("3.99") is None


def test_a_cell_without_an_interpreter_is_not_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(nightly, "interpreter", lambda version: None)
    assert nightly.main(["newest", "--place", str(tmp_path)]) == 3
    assert "| newest | not run | 0.0 | no interpreter: Python 3.11 |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        nightly.main(["nobody"])
