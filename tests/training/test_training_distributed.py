"""Two processes through the Trainer, DDP and FSDP 2, give one process's losses and weights."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers_for_tests import chatml_tokenizer
from training_support import recall_lines, small_model, steps_in, weights_in, write_lines

from deltamem_fast.cli.main import main
from deltamem_fast.training import read_log

WORKER = Path(__file__).parent / "train_worker.py"
ROOT = Path(__file__).parent.parent.parent
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, data, and a run of one process: two forwards a step, where two processes have one each."""
    place = tmp_path_factory.mktemp("distributed")
    tokenizer = chatml_tokenizer()
    tokenizer.save_pretrained(place / "model")
    small_model(tokenizer).save_pretrained(place / "model")
    write_lines(place / "d.jsonl", recall_lines())
    assert main(command(place, place / "one", accumulate=2)) == 0
    return place


def command(place, output, accumulate=1, **flags):
    """``deltamem train`` as a list."""
    flags = {"steps": 4, "lr": 1e-2, "rank": 4, "save-every": 2, "evaluate": place / "d.jsonl"} | flags
    flags |= {"output": output, "accumulate": accumulate, "backend": "reference", "dtype": "float32"}
    pairs = [str(item) for name, value in flags.items() for item in (f"--{name}", value)]
    return ["train", str(place / "model"), str(place / "d.jsonl"), *pairs, "--no-progress", "--cpu"]


def two_processes(mode, *commands, **environment):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    base = os.environ | environment | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    base |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    base |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    arguments = [sys.executable, WORKER, mode, *map(json.dumps, commands)]
    worker = subprocess.Popen(
        arguments, env=base, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output = worker.communicate(timeout=300)[0]
    finally:
        if worker.poll() is None:
            os.killpg(worker.pid, signal.SIGKILL)
    assert worker.returncode == 0, output[-6000:]


def evaluation(output):
    (entry,) = [entry for entry in read_log(output / "log.jsonl") if "evaluation" in entry]
    (found,) = entry["evaluation"].values()
    return found


def compare(ours, theirs):
    """The same losses and weights within float32's noise."""
    for one, two in zip(steps_in(ours), steps_in(theirs), strict=True):
        assert one["step"] == two["step"] and one["tokens"] == two["tokens"]
        for name in ("loss", "answer_loss", "penalty", "grad_norm", "learning_rate"):
            assert one[name] == pytest.approx(two[name], rel=1e-4), (one["step"], name)
        assert one["mean_beta"] == pytest.approx(two["mean_beta"], rel=1e-4)
    first, second = evaluation(ours), evaluation(theirs)
    assert first["answer_tokens"] == second["answer_tokens"]
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-4)
    one, two = weights_in(ours), weights_in(theirs)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-3, atol=1e-5, msg=name)


def resumed(place, mode):
    """Whether a run that goes on from its second step ends with the weights of the one that did not stop."""
    whole, later = weights_in(place / mode), weights_in(place / f"{mode}-resumed")
    return all(torch.equal(whole[name], later[name]) for name in whole)


def test_ddp(place):
    first = command(place, place / "ddp")
    again = command(place, place / "ddp-resumed", resume=place / "ddp" / "checkpoint-2")
    two_processes("ddp", first, again)
    compare(place / "ddp", place / "one")
    assert resumed(place, "ddp")
    assert json.loads((place / "ddp" / "training.json").read_text())["episodes_a_step"] == 2


def test_fsdp(place):
    first = command(place, place / "fsdp")
    again = command(place, place / "fsdp-resumed", resume=place / "fsdp" / "checkpoint-2")
    two_processes("fsdp", first, again, **FSDP)
    compare(place / "fsdp", place / "one")
    assert resumed(place, "fsdp")
    saved = {path.name for path in (place / "fsdp" / "checkpoint-2").iterdir()}
    assert "optimizer_0" in saved and not any("model" in name for name in saved)
