"""What the pages say of the repository is there: links, paths, functions, the proof, sizes."""

import ast
import functools
import json
import re
import tomllib

import pytest
from pages import PAGES, ROOT, blocks, name_of, prose

from deltamem_fast.recall.demo import run_demo
from deltamem_fast.recall.demo_text import format_demo

README = ROOT / "README.md"
MOST_BYTES = 7 * 1024
MEASURED = ("<!-- measured -->", "<!-- /measured -->")
CODE = ("deltamem_fast", "kernels", "bench", "tests", "examples", "docs")
# Words that sell.
SELLING = re.compile(r"\b(blazing|seamless\w*|effortless\w*|revolutionary|cutting-edge|simply)\b", re.I)


def markdown() -> list:
    """Every page of the repository, the generated ones included."""
    found = [*PAGES, *(ROOT / "docs").rglob("*.md"), ROOT / "bench/README.md", *(ROOT / "tests").rglob("*.md")]
    return sorted({*found, ROOT / "deltamem_fast/data/recall/README.md"})


def heading_anchors(page) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", markdown(), ids=name_of)
def test_relative_links_lead_somewhere(page):
    links = re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", prose(page))
    for link in links:
        if re.match(r"[a-z]+:", link):
            assert link.startswith("https://"), f"{name_of(page)}: {link}"
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_relative_to(ROOT) and target.exists(), f"{name_of(page)}: {link}: nothing there"
        if anchor:
            assert anchor in heading_anchors(target), f"{name_of(page)}: {link}: no such heading"


# --- files and functions


@functools.cache
def defined_in(path) -> set[str]:
    """Functions, classes, methods (Class.method) and constants of a Python file."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{item.name}" for item in node.body if isinstance(item, ast.FunctionDef)}
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def where_now(name: str) -> list[str]:
    """The files that define ``name``, for the message of what has moved."""
    folders = (ROOT / "deltamem_fast", ROOT / "kernels")
    return [name_of(path) for folder in folders for path in sorted(folder.rglob("*.py")) if name in defined_in(path)]


def paths_in(page) -> list[tuple[str, str]]:
    """Paths that begin with a folder of the repository, in backticks or Python files: (path, function or "")."""
    folders = "|".join(CODE)
    quoted = re.findall(rf"`((?:{folders})/[\w./-]*?)(?::([A-Za-z_][\w.]*))?`", prose(page))
    plain = re.findall(rf"(?<![\w`/.])((?:{folders})/[\w./-]*\.py)\b", prose(page))
    return [(path.rstrip("/"), name) for path, name in [*quoted, *((path, "") for path in plain)]]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_and_functions_that_a_page_names_are_there(page):
    missing = []
    for path, name in paths_in(page):
        if not (ROOT / path).exists():
            moved = where_now(name) if name else [name_of(p) for p in ROOT.glob(f"*/**/{path.rpartition('/')[2]}")]
            missing.append(f"{path}{':' + name if name else ''} (now: {', '.join(moved) or 'nowhere'})")
        elif name and name not in defined_in(ROOT / path):
            missing.append(f"{path}:{name} (now: {', '.join(where_now(name)) or 'nowhere'})")
    assert not missing, "\n".join(missing)


def test_kernels_that_a_page_names_are_there():
    folder = ROOT / "kernels/deltamem_kernels/triton"
    kernels = {name for path in folder.glob("*.py") for name in defined_in(path) if name.endswith("_kernel")}
    named = {name for page in PAGES for name in re.findall(r"`(?:\w+/)*(\w+_kernel)`", prose(page))}
    assert len(named) >= 15 and named <= kernels, named - kernels


def test_architecture_names_the_way_of_a_token():
    named = {name for _, name in paths_in(ROOT / "docs/architecture.md") if name}
    wanted = {"patch_model", "begin", "attention_forward", "advance", "operations", "split_projections", "launch"}
    assert wanted <= named and len(named) >= 25


def test_architecture_shows_the_contracts_that_the_linter_checks():
    linter = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    layers = [contract["layers"] for contract in linter["contracts"] if contract["type"] == "layers"]
    text = in_one_line(ROOT / "docs/architecture.md")
    assert layers
    for order in layers:
        assert f"`{' > '.join(order).replace('deltamem_fast.', '')}`" in text


def test_modules_that_a_page_runs_are_there():
    for page in PAGES:
        for module in re.findall(r"python -m ((?:bench|deltamem_\w+)[\w.]*)", page.read_text(encoding="utf-8")):
            path = ROOT / ("kernels" if module.startswith("deltamem_kernels") else "") / module.replace(".", "/")
            assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), f"{name_of(page)}: {module}"


# --- README


def tree() -> list[str]:
    """The folders of README's tree."""
    ((_, text),) = blocks(README, "text")
    found, parent = [], ""
    for line in text.splitlines():
        names = [word for word in line.split() if re.fullmatch(r"[\w/]+/,?", word)]
        names = [name.rstrip(",") for name in names]
        if not line.startswith(" "):
            parent = names[0]
            found += names if len(names) > 1 and ":" not in line else names[:1]
            if ":" in line:
                found += [names[0] + name for name in names[1:]]
        else:
            found += [parent + name for name in names]
    return found


def test_readme_shows_every_room_and_no_other():
    shown = {path.rstrip("/") for path in tree()}
    for path in shown:
        assert (ROOT / path).is_dir(), path
    there = {path.parent.relative_to(ROOT).as_posix() for path in (ROOT / "deltamem_fast").glob("*/__init__.py")}
    there |= {path.parent.relative_to(ROOT).as_posix() for path in (ROOT / "kernels").glob("*/*/__init__.py")}
    there |= {"deltamem_fast", "deltamem_fast/data", "kernels/deltamem_kernels", "bench", "docs", "examples", "tests"}
    assert shown == there


def test_readme_is_short_and_has_its_parts():
    text = README.read_text(encoding="utf-8")
    assert len(text.encode()) <= MOST_BYTES
    assert text.count(MEASURED[0]) == text.count(MEASURED[1]) == 1
    rows = text.partition(MEASURED[0])[2].partition(MEASURED[1])[0].strip().splitlines()
    assert all(row.startswith("|") for row in rows) and 1 <= len(rows) - 2 <= 10
    for part in ("make demo", "make test", "When not to use it", "not measured yet", "docs/results/README.md"):
        assert part in text, part
    assert text.count("![") == 1


def proof(page) -> list[str]:
    """The fenced block that shows the demo's output, in lines."""
    (found,) = [text for _, text in blocks(page, "") if "Asked, each in a fresh context" in text]
    return [line for line in found.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """What the demo prints with few questions: the story and the checks of bits are those of the whole one."""
    return format_demo(*run_demo(output=tmp_path_factory.mktemp("demo"), questions=1)).splitlines()


def test_readmes_proof_is_what_the_demo_prints(printed):
    lines = proof(README)
    assert len(lines) == 8
    at = [printed.index(line) for line in lines]
    assert at == sorted(at)


def test_the_commands_page_shows_the_story_as_it_is_printed(printed):
    lines = proof(ROOT / "docs/command-line.md")
    story = lines[: lines.index("Answered right, in percent, by the number of facts told")]
    anywhere = [line for line in story if not line.startswith(("backbone", "adapter"))]  # they name the machine
    assert len(anywhere) >= 18 and [line for line in anywhere if line not in printed] == []


# --- figures that stand in a sentence


def result_of(path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def newest_rows(directory: str, pattern: str) -> list[dict]:
    return max(map(result_of, (ROOT / directory).glob(pattern)), key=lambda result: result["time"])["rows"]


def in_one_line(page) -> str:
    return " ".join(page.read_text(encoding="utf-8").split())


def test_readmes_shares_are_the_newest_results():
    share = {
        (row["name"], row["parameters"].get("facts")): f"{row['values']['share']:.0%}".replace("%", " %")
        for row in newest_rows("bench/results/recall", "*.json")
        if row["name"].startswith("facts/") and "share" in row["values"]
    }
    text = in_one_line(README)
    found, ours = share["facts/bm25 top 1", 32], share["facts/msw-r8", 32]
    assert f"of 32 facts told, BM25 answers {found}, this memory {ours}" in text
    seen, ours = share["facts/full context", 16], share["facts/msw-r8", 16]
    assert f"of 16 facts it answers {seen}, from the memory {ours}" in text


@pytest.mark.parametrize("page", [README, ROOT / "docs/compatibility.md"], ids=name_of)
def test_the_tests_said_to_pass_on_a_gpu_are_the_newest_results(page):
    rows = newest_rows("bench/results", "nvidia-*.json")
    (counts,) = (row["values"] for row in rows if row["name"] == "tests")
    passed, run = counts["passed"], counts["passed"] + counts["failed"] + counts["skipped"]
    said = re.findall(r"(\d+) of the (\d+) tests for a GPU passed", in_one_line(page))
    assert said == [(str(passed), str(run))]


def test_the_figures_of_the_gradient_are_the_results():
    page = ROOT / "docs/training.md"
    (link,) = re.findall(r"\(\.\./(bench/results/[^)]*\.json)\)", page.read_text(encoding="utf-8"))
    rows = {(row["name"], row["parameters"]["tokens"]): row for row in result_of(ROOT / link)["rows"]}
    text = in_one_line(page)
    ours, theirs = rows["scan-gradient/numba", 8192], rows["scan-gradient/per-token", 8192]
    low, middle, high = ours["ratios"]["per-token"]
    assert f"take {ours['p50'] * 1e3:.2f} ms where the per-token PyTorch scan takes {theirs['p50']:.2f} s" in text
    assert f"{middle:.0f} ({low:.0f} to {high:.0f}) times as fast" in text
    assert f"with {ours['values']['memory_to_per-token']:.3f} of its peak memory" in text
    low, middle, high = rows["training-step/numba", 576]["ratios"]["reference"]
    assert f"{middle:.2f} ({low:.2f} to {high:.2f}) times as fast as with the reference" in text


# --- words


RECIPE = (
    ("two_facts_1024", "two_facts_1024_new_talk", "two_facts_1024_drawn_talk", "eight_facts", "perplexity_filled",
     "perplexity_live"),
    ("overwritten_once", "others_once", "overwritten_twice", "others_twice"),
    ("newer_in_sight", "others_newer_in_sight", "newest_all_in_sight", "others_all_in_sight"),
)  # fmt: skip


def test_each_row_of_a_recipe_is_a_result():
    """The figures of a line in training.md are all of one adapter's row, of the strategy that the line names."""

    def cell(values: dict, name: str) -> str:
        value, error = values[name], values[f"{name}_error"]
        return f"{value:.4f} ± {error:.4f}" if "perplexity" in name else f"{100 * value:.1f} ± {100 * error:.1f}"

    rows = [row for path in (ROOT / "bench/results/recall-recipe").glob("*.json") for row in result_of(path)["rows"]]
    measured = {
        (row["name"].removeprefix("recipe/")[:3], *(cell(row["values"], name) for name in names))
        for row in rows for names in RECIPE if names[0] in row["values"]
    }  # fmt: skip
    lines = re.findall(r"^\| (tsw|ssw|msw) \| (.*) \|$", prose(ROOT / "docs/training.md"), re.M)
    found = [(strategy, *line.split(" | ")[1:]) for strategy, line in lines]
    assert len(found) >= 30 and {len(line) for line in found} == {5, 7}
    assert not [line for line in found if line not in measured]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_pages_are_plain(page):
    text = page.read_text(encoding="utf-8")
    assert not SELLING.search(text) and "!" not in re.sub(r"!\[|<!--|`[^`]*`", "", prose(page))
    assert text.endswith("\n") and not re.search(r"[ \t]+$", prose(page), re.M)
    titles = re.findall(r"^# ", prose(page), re.M)
    assert len(titles) == 1
