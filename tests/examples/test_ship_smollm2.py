"""examples/recall_smollm2.ship: a finished run goes into the package whole, or nothing changes."""

import json

import pytest
import torch
from safetensors.torch import load_file
from smollm2_for_tests import CONFIGS, example, fewer, short, stand_in
from tokenizers_for_tests import default_system_tokenizer

NAME = "delta_mem_adapter.safetensors"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A finished run on the stand-in, and a package of its own."""
    fewer(monkeypatch)
    ship, train, tokenizer = example("ship"), example("train"), default_system_tokenizer()
    assert train.train(stand_in(tokenizer), tokenizer, CONFIGS["msw"], short(train), tmp_path / "run")
    for name, value in {
        "load_model": lambda *_, **named: (stand_in(tokenizer, getattr(torch, named["dtype"])), None),
        "adapter_config": lambda strategy, layers: CONFIGS[strategy],
        "SHIPPED": {name: tmp_path / "package" / name for name in ("smollm2/msw", "smollm2/ssw")},
        "RUNS": tmp_path / "runs",
    }.items():
        monkeypatch.setattr(ship, name, value)
    return tmp_path / "run"


def test_a_run_is_shipped_with_its_card_its_log_and_what_goes_on_from_it(run):
    target = example("ship").ship(run, "smollm2/msw")
    shipped, trained = load_file(target / NAME), load_file(run / NAME)
    assert shipped.keys() == trained.keys() and {v.dtype for v in shipped.values()} == {torch.bfloat16}
    assert all(torch.equal(shipped[k], trained[k].bfloat16()) for k in trained)
    assert (target / "training.json").read_bytes() == (run / "training.json").read_bytes()
    card = (target / "README.md").read_text()
    assert (
        "| trained | 4 steps, " in card
        and "| layers | 1 to 2 |" in card
        and 'patch_model(model, "smollm2/msw")' in card
    )
    kept = example("ship").RUNS / "msw"
    assert (kept / "log.jsonl").read_bytes() == (run / "log.jsonl").read_bytes()
    state = torch.load(kept / "constant.pt", weights_only=True)
    assert state["place"][0] == 2 and state["adapter"].keys()
    assert {m["exp_avg"].dtype for m in state["optimizer"]["state"].values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "what", ["another strategy", "an older version", "an older calibration", "no log", "no checkpoint"]
)
def test_what_does_not_fit_is_refused_before_anything_is_written(what, run, capsys):
    ship, name, error = example("ship"), "smollm2/msw", f"RUN: {run / 'log.jsonl'} is empty"
    if what == "another strategy":
        name, error = "smollm2/ssw", "NAME: got smollm2/ssw, but the adapter in "
    elif what == "an older version":
        about = json.loads((run / "training.json").read_text())
        del about["calibration_seconds"]
        (run / "training.json").write_text(json.dumps(about))
        error = f"RUN: {run / 'training.json'} lacks calibration_seconds"
    elif what == "an older calibration":
        about = json.loads((run / "training.json").read_text())
        about["calibration"][0] = {"shift": 0.0, "scale": 1.0, "near": 0.5, "far": 0.5}
        (run / "training.json").write_text(json.dumps(about))
        error = f"RUN: {run / 'training.json'} is of another version's calibration"
    elif what == "no log":
        (run / "log.jsonl").write_text("")
    else:
        (run / "constant.pt").unlink()
        error = str(run / "constant.pt")
    with pytest.raises(SystemExit) as stopped:
        ship.main([str(run), name])
    assert stopped.value.code == 2 and error in capsys.readouterr().err
    assert not ship.RUNS.exists() and not any(folder.exists() for folder in ship.SHIPPED.values())
