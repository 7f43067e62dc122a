"""What lies in a checkpoint beside the adapter is unpickled by transformers' Trainer, and runs nothing."""

import os
import shutil

import pytest
import torch
from training_support import recall_lines, run, write_lines

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
def test_code_in_a_checkpoint_is_not_run(checkpoint, data, tmp_path, name):
    hostile, mark = tmp_path / "run" / "checkpoint-1", tmp_path / "was run"
    shutil.copytree(checkpoint.parent, hostile.parent)
    assert (hostile / name).is_file()
    torch.save({"state": Code(mark)}, hostile / name)
    with pytest.raises(Exception, match="[Ww]eights.only"):
        run(data, tmp_path / "again", resume=str(hostile), **OPTIONS)
    assert not mark.exists()
    torch.load(hostile / name, weights_only=False)  # as it would be without care
    assert mark.exists()
