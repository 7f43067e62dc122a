"""Wheel and source distribution: what is in them, and that each works once installed."""

import gzip
import os
import stat
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest

from deltamem_fast import __version__
from release.steps import StepFailed
from release.trial import try_installed

ROOT = Path(__file__).parent.parent
# Builds write into the tree: one at a time.
pytestmark = pytest.mark.xdist_group("packaging")

EPOCH = 1_700_000_000


def run(*command, cwd=ROOT, umask=-1, **environment):
    env = os.environ | environment
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, umask=umask, env=env)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A wheel built from the tree, a source distribution of another builder, and a wheel built from that."""
    pytest.importorskip("build")
    place = tmp_path_factory.mktemp("dist")
    build, epoch = (sys.executable, "-m", "build", "--no-isolation"), {"SOURCE_DATE_EPOCH": str(EPOCH)}
    run(*build, "--wheel", "--outdir", place / "wheel", ROOT, umask=0o022, **epoch)
    run(*build, "--outdir", place / "sdist", ROOT, umask=0o077, **epoch)
    (wheel,), (again,) = (place / "wheel").iterdir(), (place / "sdist").glob("*.whl")
    return {"wheel": wheel, "sdist": again, "source": next((place / "sdist").glob("*.tar.gz"))}


def test_installed(built, tmp_path):
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", tmp_path / "site", built["wheel"])
    try_installed(sys.executable, tmp_path / "site", __version__, cwd=tmp_path, on_path=True)
    with pytest.raises(StepFailed, match="AssertionError"):  # another one's
        try_installed(sys.executable, tmp_path / "elsewhere", __version__, cwd=tmp_path)


def test_contents(built):
    with zipfile.ZipFile(built["wheel"]) as wheel, zipfile.ZipFile(built["sdist"]) as again:
        names = set(wheel.namelist())
        # The same files, so that one of them is installed for both.
        sums, sums_again = ({file.filename: file.CRC for file in archive.infolist()} for archive in (wheel, again))
        assert sums == sums_again
        entry_points = wheel.read(f"deltamem_fast-{__version__}.dist-info/entry_points.txt").decode()
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "deltamem_fast").rglob("*.py")}
    modules |= {str(p.relative_to(ROOT / "kernels")) for p in (ROOT / "kernels").rglob("*.py")}
    assert modules <= names
    assert {"deltamem_fast/inspection/page.html", "deltamem_fast/py.typed", "deltamem_kernels/py.typed"} <= names
    weights = {str(p.relative_to(ROOT)) for p in (ROOT / "deltamem_fast" / "data").rglob("*") if p.is_file()}
    assert weights and weights <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith(("tests/", "bench/", "examples/", "kernels/")) for name in names)
    assert "deltamem = deltamem_fast.__main__:main" in entry_points


def test_archives_do_not_depend_on_who_builds_them(built):
    assert built["wheel"].read_bytes() == built["sdist"].read_bytes()
    plain = {0o644, 0o755}
    with zipfile.ZipFile(built["wheel"]) as wheel:
        for entry in wheel.infolist():
            assert stat.S_IMODE(entry.external_attr >> 16) in plain, entry
            assert entry.date_time == time.gmtime(EPOCH)[:5] + (time.gmtime(EPOCH).tm_sec // 2 * 2,), entry
    with tarfile.open(built["source"]) as source:
        members = source.getmembers()
    owners = {(m.uid, m.gid, m.uname, m.gname, m.mtime) for m in members}
    assert owners == {(0, 0, "", "", EPOCH)} and {m.mode for m in members} <= plain
    assert [m.name for m in members] == sorted(m.name for m in members)
    with gzip.open(built["source"]) as packed:
        packed.read(1)
        assert packed.mtime == EPOCH


def test_a_source_distribution_leaves_tests_out(built):
    with tarfile.open(built["source"]) as source:
        rooms = {name.split("/")[1] for name in source.getnames() if "/" in name}
    assert {"deltamem_fast", "kernels", "constraints.txt", "LICENSE"} <= rooms
    assert not rooms & {"tests", "bench", "examples", "release", "docs"}


def test_the_version_stands_in_one_place():
    found = [
        str(path.relative_to(ROOT))
        for pattern in ("*.py", "*.toml", "deltamem_fast/**/*.py", "kernels/**/*.py", "bench/**/*.py")
        for path in ROOT.glob(pattern)
        if f'"{__version__}"' in path.read_text()
    ]
    assert found == ["deltamem_fast/version.py"]
