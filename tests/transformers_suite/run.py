"""transformers' own common model tests, on bare and patched Qwen3 and Llama: what passes bare must pass patched.

The tests come from the source distribution of the installed version, fetched by pip into a cache folder when this is
run (DELTAMEM_TRANSFORMERS_TESTS, else ~/.cache/deltamem-fast). Exit status 1: something that passes bare does not
pass patched; 2: the tests cannot be had or run.
"""

import json
import os
import subprocess
import sys
import tarfile
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
FAMILIES = ("Qwen3", "Llama")
PARAMETERIZED = "parameterized==0.9.0"  # what the tests import and this project does not need
# What the tests import and the source distribution does not hold; both test what is not asked here.
MISSING = {"exporters/test_export.py": "ExportTesterMixin", "generation/test_utils.py": "GenerationTesterMixin"}
LONGEST = 1500  # seconds


class CannotRun(Exception):
    pass


def fetched() -> Path:
    """The folder with the package ``transformers_tests`` of the installed version; made if it is not there."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deltamem-fast"
    cache = Path(os.environ.get("DELTAMEM_TRANSFORMERS_TESTS") or default)
    folder = cache / f"transformers-{version('transformers')}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        made = Path(temporary) / "made"
        wanted = f"transformers=={version('transformers')}"
        _pip("download", "--no-deps", "--no-binary", "transformers", "--no-build-isolation", "-d", temporary, wanted)
        _pip("install", "--no-deps", "--target", made, PARAMETERIZED)
        (source,) = Path(temporary).glob("transformers-*.tar.gz")
        with tarfile.open(source) as archive:
            _extract(archive, made / "transformers_tests")
        for name, mixin in MISSING.items():
            path = made / "transformers_tests" / name
            path.parent.mkdir(exist_ok=True)
            (path.parent / "__init__.py").touch()
            path.write_text(f"class {mixin}:\n    pass\n")
        made.rename(folder)
    return folder


def _pip(*arguments) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise CannotRun(
            f"the source distribution of transformers {version('transformers')} cannot be fetched: pip "
            f"{arguments[0]} ended with {done.returncode}\n{done.stdout[-3000:]}"
        )


def _extract(archive: tarfile.TarFile, target: Path) -> None:
    """The files directly under ``tests/``, as a package."""
    target.mkdir(parents=True)
    (target / "__init__.py").touch()
    for member in archive:
        parts = Path(member.name).parts
        if member.isfile() and len(parts) == 3 and parts[1] == "tests" and parts[2].endswith(".py"):
            (target / parts[2]).write_bytes(archive.extractfile(member).read())
    if not (target / "test_modeling_common.py").is_file():
        raise CannotRun("the source distribution of transformers has no tests/test_modeling_common.py")


def run(folder: Path, family: str, patched: bool) -> dict[str, list[str]]:
    """Outcome and message of each test and subtest by name."""
    with tempfile.TemporaryDirectory() as temporary:
        outcomes = Path(temporary) / "outcomes.json"
        root = HERE.parents[1]
        environment = os.environ | {
            "FAMILY": family,
            "PATCHED": "1" if patched else "",
            "OUTCOMES": str(outcomes),
            "PYTHONPATH": os.pathsep.join([*map(str, (HERE, folder, root, root / "kernels")), *_path()]),
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "CUDA_VISIBLE_DEVICES": "",
        }
        options = ("-p", "outcomes", "-p", "no:cacheprovider", "-p", "no:xdist", "-q", "--noconftest", "--rootdir")
        command = [sys.executable, "-m", "pytest", HERE / "common_models.py", *options, HERE, "-c", os.devnull]
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LONGEST
        )
        if done.returncode not in (0, 1) or not outcomes.is_file():
            raise CannotRun(f"{family}: pytest ended with {done.returncode}\n{done.stdout[-5000:]}")
        return json.loads(outcomes.read_text(encoding="utf-8"))


def _path() -> list[str]:
    # Where the caller's own packages come from: another transformers, for one.
    return [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []


def counts(found: dict[str, list[str]]) -> str:
    """How many tests and subtests passed, were skipped and failed, in words."""
    words = []
    for what, names in (
        ("tests", [name for name in found if " [" not in name]),
        ("subtests", [name for name in found if " [" in name]),
    ):
        numbers = [sum(found[name][0] == outcome for name in names) for outcome in ("passed", "skipped", "failed")]
        words.append("{} {} passed, {} skipped, {} failed".format(what, *numbers))
    return "; ".join(words)


def main() -> int:
    try:
        folder = fetched()
        runs = [(family, patched) for family in FAMILIES for patched in (False, True)]
        with ThreadPoolExecutor(2) as pool:
            found = dict(zip(runs, pool.map(lambda which: run(folder, *which), runs)))
    except (CannotRun, subprocess.TimeoutExpired, OSError) as error:
        print(f"test-transformers: {error}", file=sys.stderr)
        return 2
    lost = 0
    for family in FAMILIES:
        bare, patched = found[family, False], found[family, True]
        print(f"{family} bare:    {counts(bare)}\n{family} patched: {counts(patched)}")
        for name, (outcome, _) in bare.items():
            ours, message = patched.get(name, ["not run", ""])
            if outcome == "passed" and ours != "passed":
                lost += 1
                print(f"  {family} {name}: passes bare, {ours} patched\n    {message}")
        if not any(outcome == "passed" for outcome, _ in bare.values()):
            print(f"test-transformers: no test of {family} passes bare", file=sys.stderr)
            return 2
    print(f"transformers {version('transformers')}: {lost} of what passes bare does not pass patched")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
