"""Steps that pass, fail and are not run, what the release and the night make of them, and what a cell asks pip for."""

import os
import re
import sys
import time

import pytest

from release import nightly
from release.check import BILL, REQUIRED, check_bill, check_demo, check_tags, clear
from release.steps import FAILED, NOT_RUN, PASSED, ROOT, StepFailed, Steps, clean_environment, run, run_logged, table


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


def test_a_check_that_breaks_has_failed_and_the_others_are_run(steps):
    assert not steps.run("one", lambda: [][0])
    assert steps.run("two", lambda: "found")
    assert [row.outcome for row in steps.rows] == [FAILED, PASSED] and not steps.passed
    assert steps.rows[0].found.startswith("IndexError: ") and nightly.status(steps) == 1


def test_what_a_long_command_prints_is_in_its_log_while_it_runs(tmp_path):
    said, log = [], tmp_path / "log"

    def say(text):
        said.append((text, log.read_text() if log.exists() else None))

    def logged(code, **options):
        command = (sys.executable, "-c", code)
        return run_logged(*command, cwd=tmp_path, env=clean_environment(), log=log, say=say, **options)

    wait = "import sys, time; print('one', flush=True); time.sleep(3); print('two', file=sys.stderr)"
    assert logged(wait, every=0.5) == "one\ntwo\n"
    assert said[0][0].endswith(f"output in {log}")
    assert any("s: one" in text and held == "one\n" for text, held in said[1:])
    with pytest.raises(StepFailed, match=r"exit status 3\nreason"):
        logged("import sys; sys.exit(print('reason') or 3)")
    child = "import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', sys.argv[1]])"
    child = child.replace("sys.argv[1]", repr(f"import time; time.sleep(4); open({str(tmp_path / 'late')!r}, 'w')"))
    with pytest.raises(StepFailed, match=r"not done after 2 s\nbegun"):
        logged(child, timeout=2)
    time.sleep(3)
    assert not (tmp_path / "late").exists()  # its children have ended with it
    with pytest.raises(StepFailed, match="nothing-there"):
        run_logged("nothing-there", cwd=tmp_path, env={}, log=log, say=say)


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
    monkeypatch.setenv("PYTHONOPTIMIZE", "1")  # no assertion would be made
    monkeypatch.setenv("PYTEST_ADDOPTS", "--collect-only")
    assert not {"PYTHONOPTIMIZE", "PYTEST_ADDOPTS"} & clean_environment().keys()
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


def test_a_version_is_of_one_commit():
    assert check_tags("1.0", ["v1.0", "recall-data", "version"], ["v1.0"]) == "v1.0"
    assert check_tags("1.0", [], []) == "no tag v1.0 yet"
    with pytest.raises(StepFailed, match="v1.0 is the tag of another commit"):
        check_tags("1.0", [], ["v1.0"])
    with pytest.raises(StepFailed, match="the commit is tagged v0.9, built was 1.0"):
        check_tags("1.0", ["v0.9", "v1.0"], ["v1.0"])


def test_what_an_earlier_check_left_is_no_more_there(tmp_path):
    for name in ("deltamem_fast-0.9-py3-none-any.whl", "deltamem_fast-0.9.tar.gz", BILL, "SHA256SUMS", "mine.whl"):
        (tmp_path / name).write_text("x")
    assert clear(tmp_path) == "removed 4 files of an earlier check"
    assert [path.name for path in tmp_path.iterdir()] == ["mine.whl"]
    assert clear(tmp_path / "nothing") == "removed 0 files of an earlier check"


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
    cell = nightly.Cell(
        "one", "3.11", (("transformers", nightly.OLDEST),)
    )  # the newest of its series, not 5.10.2 alone
    assert "transformers==5.10.*" in nightly.requirements(cell, ["transformers>=5.10.2,<6"])


def test_every_corner_has_a_cell():
    assert len({cell.name for cell in nightly.CELLS}) == len(nightly.CELLS)
    for age in (nightly.OLDEST, nightly.NEWEST):
        assert tuple((name, age) for name in nightly.PINNED) in {cell.versions for cell in nightly.CELLS}
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    lowest = min((cell.python for cell in nightly.CELLS), key=lambda version: int(version.partition(".")[2]))
    assert f'python_requires=">={lowest}"' in text
    page = (ROOT / "docs/compatibility.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if re.match(r"\| `[\w.-]+` \| 3\.", line)]
    assert [row.split(" | ")[:-1] for row in rows] == [
        [f"| `{cell.name}`", cell.python, *(dict(cell.versions)[name] for name in nightly.PINNED[:-1]),
         dict(cell.versions)["triton"] + ", NumPy below 2.4" * (cell.more == ("numpy<2.4",))] for cell in nightly.CELLS
    ]  # fmt: skip


def test_the_tests_of_a_cell_are_there():
    assert [path for path in nightly.TESTS if not (ROOT / path).exists()] == []


def test_deprecations_are_errors_but_for_those_that_are_named():
    filters = nightly.warning_filters()
    assert filters[:3] == ["error::DeprecationWarning", "error::PendingDeprecationWarning", "error::FutureWarning"]
    for ignored in nightly.IGNORED:
        assert ignored.category in nightly.DEPRECATIONS and len(ignored.begins) > 20 and ignored.why
        assert not {":", ","} & set(ignored.begins)  # what parts them in -W and in PYTHONWARNINGS


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
