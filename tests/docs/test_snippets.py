"""The pages' Python runs as it stands there, on a small local model; the command line takes their commands."""

import json
import re
import shlex
from types import SimpleNamespace

import pytest
from pages import PAGES, ROOT, blocks, name_of

from deltamem_fast.cli.main import parser
from deltamem_fast.eval.paper import PAPER_TASKS
from deltamem_fast.eval.policies import policy_named
from deltamem_fast.eval.tasks import TASKS
from deltamem_fast.recall.weights import find_weights

MODEL = "Qwen/Qwen3-4B-Instruct-2507"
ADAPTER = "declare-lab/delta-mem_qwen3_4b-instruct"
README = ROOT / "README.md"
ELSEWHERE = README, ROOT / "docs/vllm.md"  # below; in tests/vllm, where vLLM is
WITH_PYTHON = [page for page in PAGES if page not in ELSEWHERE and blocks(page, "python")]


class Hub:
    """Takes the place of huggingface_hub's client: nothing leaves the machine."""

    def __init__(self, token=None):
        pass

    def create_repo(self, repo_id, **options):
        return SimpleNamespace(repo_id=repo_id)

    def file_exists(self, *arguments, **options):
        return False

    def upload_folder(self, **options):
        return SimpleNamespace(commit_url="https://hub/commit/1")


def here(source: str) -> str:
    """A snippet with the hub's names replaced by those of local directories, and the GPU by the CPU."""
    shipped = find_weights()
    for name, local in (
        (MODEL, str(shipped.backbone)),
        (ADAPTER, str(shipped.adapters["msw"])),
        ("cuda", "cpu"),
    ):
        source = source.replace(f'"{name}"', f'"{local}"')
    assert "Qwen/" not in source and "declare-lab/" not in source
    return source


def run_page(page) -> dict:
    """The page's blocks one behind another, as a reader would type them; what they have defined."""
    names: dict = {"__name__": "page"}
    for line, source in blocks(page, "python"):
        # As many empty lines in front: an error names the page's own line.
        exec(compile("\n" * (line - 1) + here(source), name_of(page), "exec"), names)
    return names


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder with what the pages read: a text, and data to train on."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    (tmp_path / "book.txt").write_text("The code of Corpus is 42. The glass clock is in the hall.", encoding="utf-8")
    said = ("The code of Corpus is 42.", "OK.", "What is the code of Corpus?", "42")
    line = json.dumps({"messages": [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(said)]})
    for name in ("train.jsonl", "held-out.jsonl"):
        (tmp_path / name).write_text(f"{line}\n" * 4, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
def test_the_pages_python_runs(page, folder):
    assert run_page(page)


def test_the_pages_that_show_python_are_found():
    assert {page.stem for page in WITH_PYTHON} >= {"memory", "sessions", "serving", "training", "inspection"}


def test_readme_has_ten_lines_that_keep_a_memory(folder, capsys):
    ((_, source),) = blocks(README, "python")
    lines = [line for line in source.splitlines() if line.strip()]
    assert len(lines) == 10 and f'"{MODEL}"' in source and f'"{ADAPTER}"' in source
    names = run_page(README)
    assert all(state.abs().max() > 0 for _, state in names["memory"].items())
    assert capsys.readouterr().out.strip() and (folder / "ada.safetensors").is_file()


def commands() -> list[tuple[str, str]]:
    """Every line of a fenced block that calls ``deltamem``, in any page."""
    found = []
    for page in PAGES:
        for line, text in blocks(page, ""):
            for number, command in enumerate(text.replace("\\\n", " ").splitlines(), line):
                if re.match(r"(\$ )?deltamem [a-z]", command) and not command.startswith("deltamem demo: "):
                    found.append((f"{name_of(page)}:{number}", command.removeprefix("$ ").partition("  #")[0]))
    return found


def test_commands_are_understood(capsys):
    """Each line is one that the command line takes: its options, their kinds, and what an evaluation runs."""
    found = commands()
    assert len(found) >= 6
    for where, line in found:
        try:
            parsed = parser().parse_args(shlex.split(line)[1:])
        except SystemExit:
            pytest.fail(f"{where}: {line}: {capsys.readouterr().err}")
        for text in getattr(parsed, "policy", None) or ():
            policy_named(text)
        tasks = getattr(parsed, "task", None) or ()
        for text in [tasks] if isinstance(tasks, str) else tasks:
            assert text.partition("=")[0] in (*TASKS, *PAPER_TASKS), where


def test_every_make_target_that_a_page_names_is_there():
    rules = re.findall(r"^([a-z][\w -]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    targets = {target for rule in rules for target in rule.split()}
    for page in PAGES:
        for target in re.findall(r"(?:`|^)make ([a-z][a-z0-9-]*)", page.read_text(encoding="utf-8"), re.M):
            assert target in targets, f"{name_of(page)}: make {target}"
