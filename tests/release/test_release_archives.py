"""What release.archives says of wheels and source distributions that are not as they should be."""

import io
import tarfile
import zipfile

import pytest

from release.archives import check_sdist, check_wheel, packaged, sha256
from release.steps import StepFailed

TRACKED = [
    "deltamem_fast/__init__.py", "deltamem_fast/py.typed", "deltamem_fast/data/a/weights.bin",
    "kernels/deltamem_kernels/py.typed", "tests/test_a.py", "bench/__main__.py", "setup.py",
]  # fmt: skip
INFO = "deltamem_fast-1.dist-info/"
WHOLE = [*packaged(TRACKED), *(INFO + name for name in ("licenses/LICENSE", "METADATA", "RECORD", "entry_points.txt"))]
FILES = [
    "deltamem_fast/__init__.py", "deltamem_fast/py.typed", "deltamem_fast/data/a/weights.bin",
    "kernels/deltamem_kernels/py.typed", "setup.py", "pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md",
    "constraints.txt", "PKG-INFO", "setup.cfg", "deltamem_fast.egg-info/SOURCES.txt",
]  # fmt: skip


def wheel_of(place, names):
    path = place / "deltamem_fast-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name in names:
            wheel.writestr(name, "")
    return path


def sdist_of(place, names, folder="deltamem_fast-1/", kind=tarfile.REGTYPE):
    path = place / "deltamem_fast-1.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name in names:
            member = tarfile.TarInfo(folder + name)
            member.type = kind
            archive.addfile(member, io.BytesIO())
    return path


def test_a_whole_wheel(tmp_path):
    assert check_wheel(wheel_of(tmp_path, WHOLE), TRACKED).startswith("4 files, 1 of them data")


@pytest.mark.parametrize("missing", [name for name in WHOLE if "__init__" not in name])
def test_what_a_wheel_lacks_is_named(tmp_path, missing):
    with pytest.raises(StepFailed, match=missing.removeprefix(INFO)):
        check_wheel(wheel_of(tmp_path, [name for name in WHOLE if name != missing]), TRACKED)


@pytest.mark.parametrize("more", ["tests/test_a.py", "bench/__main__.py", "deltamem_fast/left.py", "stray.py"])
def test_what_a_wheel_should_not_hold_is_named(tmp_path, more):
    with pytest.raises(StepFailed, match=f"holds {more}"):
        check_wheel(wheel_of(tmp_path, [*WHOLE, more]), TRACKED)


def test_a_wheel_with_other_bytes(tmp_path):
    for name in TRACKED:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    path = wheel_of(tmp_path, WHOLE)
    assert check_wheel(path, TRACKED, tmp_path).startswith("4 files")
    (tmp_path / "kernels/deltamem_kernels/py.typed").write_bytes(b"committed")
    with pytest.raises(StepFailed, match="has other bytes of deltamem_kernels/py.typed"):
        check_wheel(path, TRACKED, tmp_path)


def test_a_whole_sdist(tmp_path):
    assert check_sdist(sdist_of(tmp_path, FILES), TRACKED).startswith(f"{len(FILES)} files")


@pytest.mark.parametrize("missing", ["setup.py", "constraints.txt", "kernels/deltamem_kernels/py.typed"])
def test_what_an_sdist_lacks_is_named(tmp_path, missing):
    with pytest.raises(StepFailed, match=f"lacks {missing}"):
        check_sdist(sdist_of(tmp_path, [name for name in FILES if name != missing]), TRACKED)


@pytest.mark.parametrize("more", ["tests/test_a.py", "bench/__main__.py", "kernels/stray.py", "deltamem_fast/a.pyc"])
def test_what_an_sdist_should_not_hold_is_named(tmp_path, more):
    with pytest.raises(StepFailed, match=f"holds {more}"):
        check_sdist(sdist_of(tmp_path, [*FILES, more]), TRACKED)


@pytest.mark.parametrize("odd", [{"folder": "elsewhere/"}, {"kind": tarfile.SYMTYPE}])
def test_an_sdist_of_other_folders_or_of_links(tmp_path, odd):
    with pytest.raises(StepFailed, match="neither files nor folders of deltamem_fast-1"):
        check_sdist(sdist_of(tmp_path, FILES, **odd), TRACKED)


def test_sha256(tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    assert sha256(tmp_path / "empty") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
