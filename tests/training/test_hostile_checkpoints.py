"""What lies in a checkpoint beside the adapter is unpickled by transformers' Trainer, and runs nothing."""

import contextlib
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from training_support import recall_lines, run, write_lines

from deltamem_fast.errors import FileFormatError
from deltamem_fast.training import checkpoints
from deltamem_fast.training.pickles import check_pickles

OPTIONS = {"steps": 3, "save_every": 1, "keep": 9}


class Code:
    """What a pickle runs."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_lines(tmp_path_factory.mktemp("data") / "train.jsonl", recall_lines())


@pytest.fixture(scope="module")
def checkpoint(data, tmp_path_factory):
    place = tmp_path_factory.mktemp("run")
    run(data, place, **OPTIONS)
    return place / "checkpoint-1"


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_code_in_a_checkpoint_is_not_run(checkpoint, data, tmp_path, name, monkeypatch):
    hostile, mark = tmp_path / "run" / "checkpoint-1", tmp_path / "was run"
    shutil.copytree(checkpoint.parent, hostile.parent)
    assert (hostile / name).is_file()
    torch.save({"state": Code(mark)}, hostile / name)
    for output, resume in ((tmp_path / "again", str(hostile)), (hostile.parent, "auto")):
        before = {path: path.read_bytes() for path in hostile.parent.rglob("*") if path.is_file()}
        for checkpoint in hostile.parent.glob("checkpoint-[23]"):
            torch.save({"state": Code(mark)}, checkpoint / name)
            before[checkpoint / name] = (checkpoint / name).read_bytes()
        with pytest.raises(FileFormatError, match=rf"{name}: got posix\.mkdir, allowed what a run has saved"):
            run(data, output, resume=resume, **OPTIONS)
        assert before == {path: path.read_bytes() for path in hostile.parent.rglob("*") if path.is_file()}
    assert not mark.exists() and not (tmp_path / "again" / "log.jsonl").exists()
    # Without that look the Trainer refuses it, too.
    monkeypatch.setattr(checkpoints, "check_pickles", lambda checkpoint: None)
    with pytest.raises(Exception, match="[Ww]eights.only"):
        run(data, tmp_path / "again", resume=str(hostile), **OPTIONS)
    assert not mark.exists()
    torch.load(hostile / name, weights_only=False)  # as it would be without care
    assert mark.exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"nonsense", "half"])
def test_a_damaged_state_is_named(checkpoint, data, tmp_path, content):
    damaged = tmp_path / "run" / "checkpoint-1"
    shutil.copytree(checkpoint.parent, damaged.parent)
    whole = (damaged / "optimizer.pt").read_bytes()
    (damaged / "optimizer.pt").write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    with pytest.raises(FileFormatError, match=r"resume: .*optimizer\.pt: got a damaged file, allowed what"):
        run(data, tmp_path / "again", resume=str(damaged), **OPTIONS)
    assert not (tmp_path / "again").exists()


def shards(place, **numbers):
    """What FSDP leaves of an optimizer: an index, and tensors and numbers in a file."""
    parameter = {"exp_avg": torch.ones(3), "half": torch.ones(2, dtype=torch.bfloat16), "step": torch.tensor(1.0)}
    groups = [{"lr": 0.1, "betas": (0.9, 0.99), "foreach": None, "params": ["a"], **numbers}]
    dcp.save({"optimizer": {"state": {"a": parameter}, "param_groups": groups}}, checkpoint_id=place)
    return place


def test_shards_are_looked_through_too(tmp_path):
    check_pickles(shards(tmp_path / "whole" / "optimizer_0").parent)
    mark = tmp_path / "was run"
    number = shards(tmp_path / "number" / "optimizer_0", name=Code(mark))
    with pytest.raises(FileFormatError, match=r"__0_0\.distcp: got posix\.mkdir, allowed what a run has saved"):
        check_pickles(number.parent)
    index = shards(tmp_path / "index" / "optimizer_0") / ".metadata"
    whole = index.read_bytes()
    for content, said in (
        (pickle.dumps(Code(mark)), r"got posix\.mkdir"),
        (whole[:-20], "got a damaged file"),
        (pickle.dumps({}), "got a damaged file"),
        (whole.replace(b"__0_0.distcp", b"../0_0.distc"), "got entries in other places"),
        (whole.replace(b"torch.serialization", b"torch.serializatiom"), "got torch.serializatiom._get_layout"),
    ):
        index.write_bytes(content)
        with pytest.raises(FileFormatError, match=said):
            check_pickles(index.parent.parent)
    assert not mark.exists()
    index.write_bytes(pickle.dumps(Code(mark)))
    with contextlib.suppress(Exception):  # as it would be without care
        dcp.FileSystemReader(index.parent).read_metadata()
    assert mark.exists()


def test_numpy_stands_in_a_random_state_alone(tmp_path):
    state = {"numpy": np.random.get_state(), "python": (3, (1, 2), None), "cpu": torch.get_rng_state()}
    torch.save(state, tmp_path / "rng_state_0.pth")
    check_pickles(tmp_path)
    torch.save(state, tmp_path / "scheduler.pt")
    with pytest.raises(FileFormatError, match=r"scheduler\.pt: got .*numpy"):
        check_pickles(tmp_path)
