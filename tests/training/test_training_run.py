"""train: what is learnt, saved, logged and resumed."""

import json
import signal
import threading

import pytest
import torch
from support import tiny_model
from tokenizers_for_tests import chatml_tokenizer
from training_support import (
    chat,
    recall_lines,
    run,
    small_model,
    steps_in,
    weights_in,
    without_time,
    write_lines,
)

from deltamem_fast import DeltaMemConfig, load_adapter, patch_model, save_adapter
from deltamem_fast.adapter.files import SAFETENSORS_NAME
from deltamem_fast.config import CONFIG_NAME
from deltamem_fast.errors import FileFormatError
from deltamem_fast.training import TrainingOptions, draw_curves, read_log, train
from deltamem_fast.training.checkpoints import WHOLE_NAME, Run, newest_checkpoint, step_of
from deltamem_fast.training.log import TrainingLog, smoothed


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_lines(tmp_path_factory.mktemp("data") / "train.jsonl", recall_lines())


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """An uninterrupted run of 8 steps, with a checkpoint every 3: its directory, its result and its model."""
    output = tmp_path_factory.mktemp("run") / "whole"
    model = small_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = run(data, output, evaluate=[data], model=model, steps=8, accumulate=2, save_every=3, keep=9)
    return output, result, model, before


# --- what a run makes


def test_the_loss_goes_down_and_the_memory_beats_the_backbone(whole):
    output, result, _, _ = whole
    losses = [step["answer_loss"] for step in steps_in(output)]
    assert len(losses) == 8 and sum(losses[-3:]) < sum(losses[:3]) - 0.2
    (found,) = result.evaluation.values()
    assert found["loss"] < found["no_memory_loss"] - 0.05
    assert result.steps == result.total_steps == 8 and not result.interrupted


def test_the_backbone_is_what_it_was(whole):
    _, _, model, before = whole
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".delta_memory." not in name)


def test_optimizer_state_is_the_adapters_alone(whole):
    output, _, model, _ = whole
    state = torch.load(output / "checkpoint-8" / "optimizer.pt", weights_only=True)["state"]
    trained = [p for name, p in model.named_parameters() if p.requires_grad]
    shapes = sorted(list(entry["exp_avg"].shape) for entry in state.values())
    assert shapes == sorted(list(parameter.shape) for parameter in trained) and len(shapes) > 0
    # q, k, v, β's weight and bias, Δq and Δo of two layers.
    assert len(trained) == 2 * 7


def test_the_adapter_is_saved_in_float32_and_loads(whole):
    output, _, model, _ = whole
    saved = weights_in(output)
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    other = patch_model(small_model(), output, backend="reference")
    for (name, ours), (_, theirs) in zip(model.named_parameters(), other.named_parameters()):
        assert torch.equal(ours, theirs), name
    unused = [name for name in saved if name.endswith(("delta_k_proj", "delta_v_proj"))]
    assert len(unused) == 4 and all(not saved[name].any() for name in unused)


def test_files_of_a_run(whole):
    output, _, _, _ = whole
    assert {path.name for path in output.iterdir()} == {
        "README.md", "log.jsonl", "curves.png", "training.json", "delta_mem_config.json",
        "delta_mem_adapter.safetensors", "checkpoint-3", "checkpoint-6", "checkpoint-8",
    }  # fmt: skip
    # A checkpoint holds the adapter, never the backbone.
    assert {path.name for path in (output / "checkpoint-3").iterdir()} == {
        "delta_mem_config.json", "delta_mem_adapter.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth",
        "trainer_state.json", "checkpoint.json",
    }  # fmt: skip
    card = (output / "README.md").read_text()
    assert "8 steps of 4 episodes" in card and "| lr | 0.01 |" in card and "| rank | 4 |" in card
    # The tiny backbone came from no hub, and where it all lies is nobody else's business.
    assert "base_model" not in card
    for path in (*output.glob("*.*"), *output.glob("checkpoint-8/*.json")):
        assert str(output.parent).encode() not in path.read_bytes(), path
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_log_has_a_line_for_every_step(whole):
    output, _, _, _ = whole
    entries = read_log(output / "log.jsonl")
    steps = [entry for entry in entries if "loss" in entry]
    assert [entry["step"] for entry in steps] == list(range(1, 9))
    for entry in steps:
        assert entry["loss"] == pytest.approx(entry["answer_loss"] + 0.01 * entry["penalty"], rel=1e-6)
        assert len(entry["mean_beta"]) == len(entry["saturated"]) == 2
        assert all(0 < beta < 1 for beta in entry["mean_beta"]) and entry["grad_norm"] > 0
        assert entry["tokens"] > 0 and entry["tokens_per_second"] > 0
    assert steps[-1]["epoch"] == pytest.approx(8 * 4 / 12, abs=1e-5)
    rates = [entry["learning_rate"] for entry in steps]
    assert max(rates) == 1e-2 and rates[0] < rates[1] > rates[-1]
    (evaluation,) = [entry["evaluation"] for entry in entries if "evaluation" in entry]
    assert not any("/" in name for name in evaluation)
    assert [set(found) for found in evaluation.values()] == [{"loss", "no_memory_loss", "answer_tokens"}]


def test_a_step_counts_every_answer_token_alike(data, tmp_path):
    """Two forwards of one episode and one forward of two are the same step, though the answers differ in length."""
    apart = run(data, tmp_path / "a", batch_size=1, accumulate=2, gate_weight=0.0)
    together = run(data, tmp_path / "b", batch_size=2, accumulate=1, gate_weight=0.0)
    for one, two in zip(steps_in(apart.output), steps_in(together.output)):
        assert one["answer_loss"] == pytest.approx(two["answer_loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-4)


def test_the_evaluation_is_a_mean_over_tokens(data, tmp_path):
    """Whatever the batches are: 12 examples in batches of 5 leave a short one."""
    found = [
        run(data, tmp_path / str(size), evaluate=[data], batch_size=size, steps=1, warmup=0.0, lr=1e-9).evaluation
        for size in (5, 1)
    ]
    assert found[0][data]["answer_tokens"] == found[1][data]["answer_tokens"]
    assert found[0][data]["loss"] == pytest.approx(found[1][data]["loss"], rel=1e-5)
    assert found[0][data]["no_memory_loss"] == pytest.approx(found[1][data]["no_memory_loss"], rel=1e-5)


STRATEGIES = {
    "ssw": DeltaMemConfig.ssw("sentence_mean", rank=4),
    "msw": DeltaMemConfig.msw(2, rank=4),
    "own λ": DeltaMemConfig(rank=4, couple_lambda=False, trainable_delta_scale=True, delta_o_rmsnorm=True),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_strategies(name, data, tmp_path):
    result = run(data, tmp_path / "out", adapter=STRATEGIES[name], steps=2, no_memory_probability=0.3)
    assert all(step["grad_norm"] > 0 for step in steps_in(result.output))
    other = patch_model(small_model(), tmp_path / "out", backend="reference")
    assert other.model.layers[0].self_attn.delta_memory.config == STRATEGIES[name]


def test_kinds_are_logged_apart(tmp_path):
    lines = [{"messages": chat("it is a.", "ok", "hm", "ok", "what?", letter)} for letter in "abcd"]
    data = write_lines(tmp_path / "d.jsonl", lines)
    changes = {"visible_turns": 2, "state_only_probability": 0.5, "no_memory_probability": 0.5, "accumulate": 2}
    steps = steps_in(run(data, tmp_path / "out", **changes).output)
    assert any("state_only_loss" in step for step in steps) and any("no_memory_loss" in step for step in steps)
    no_memory = run(data, tmp_path / "none", state_only_probability=0.0, no_memory_probability=1.0, gate_weight=0.0)
    for step in steps_in(no_memory.output):
        assert step["no_memory_loss"] == pytest.approx(step["answer_loss"]) and step["grad_norm"] == 0


def test_a_bfloat16_backbone_with_float32_masters(data, tmp_path):
    model = small_model(dtype=torch.bfloat16)
    run(data, tmp_path / "a", model=model, steps=3, lr=1e-5, warmup=0.0)
    dtypes = {(".delta_memory." in name, p.dtype) for name, p in model.named_parameters()}
    assert dtypes == {(False, torch.bfloat16), (True, torch.float32)}
    moved = [tensor for name, tensor in weights_in(tmp_path / "a").items() if name.endswith("memory_v_proj")]
    # Steps of 1e-5 are lost in bfloat16, and kept in the masters.
    assert all((tensor != tensor.bfloat16().float()).any() for tensor in moved)
    # Training on begins from the masters, not from what patching rounds them to.
    again = small_model(dtype=torch.bfloat16)
    run(data, tmp_path / "b", model=again, adapter=tmp_path / "a", steps=1, lr=1e-30, warmup=0.0)
    first, second = weights_in(tmp_path / "a"), weights_in(tmp_path / "b")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("reentrant", (False, True))
def test_gradient_checkpointing_is_the_same_run(whole, data, tmp_path, reentrant):
    checkpointing = {"gradient_checkpointing": True, "reentrant": reentrant}
    run(data, tmp_path, evaluate=[data], steps=8, accumulate=2, save_every=3, keep=9, **checkpointing)
    for ours, theirs in zip(steps_in(tmp_path), steps_in(whole[0]), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
        assert ours["mean_beta"] == pytest.approx(theirs["mean_beta"], rel=1e-4)


def test_a_loss_that_is_not_finite_ends_the_run(whole, data, tmp_path):
    model = patch_model(small_model(), whole[0], backend="reference")
    with torch.no_grad():
        model.model.layers[0].self_attn.delta_memory.delta_o_proj.fill_(3e38)
    save_adapter(model, tmp_path / "broken")
    with pytest.raises(ValueError, match="loss: got nan at step 1; checkpoints in .* are from before"):
        run(data, tmp_path / "run", adapter=tmp_path / "broken", save_every=1)
    assert newest_checkpoint(tmp_path / "run") is None
    assert [entry["loss"] for entry in read_log(tmp_path / "run" / "log.jsonl")] == ["nan"]


def test_a_gradient_that_is_not_finite_is_no_step(data, tmp_path):
    model = small_model()
    steps = []

    def spoil(gradient):
        steps.append(len(steps) + 1)
        return gradient * float("nan") if len(steps) == 3 else gradient

    def watch(attention, _):
        attention.delta_memory.memory_v_proj.register_hook(spoil)
        handle.remove()

    handle = model.model.layers[0].self_attn.register_forward_pre_hook(watch)
    with pytest.raises(ValueError, match="grad_norm: got nan at step 3; checkpoints in .* are from before"):
        run(data, tmp_path, model=model, steps=5, save_every=1, warmup=0.0)
    log = read_log(tmp_path / "log.jsonl")
    assert [entry["grad_norm"] == "nan" for entry in log] == [False, False, True] and isinstance(log[-1]["loss"], float)
    assert newest_checkpoint(tmp_path).name == "checkpoint-2"
    saved = weights_in(newest_checkpoint(tmp_path))
    ours = {name: p for name, p in model.named_parameters() if ".delta_memory." in name}
    for name, weight in saved.items():
        prefix, _, key = name.rpartition(".")
        found = ours[f"{prefix}.delta_memory.{key}"]
        assert torch.isfinite(found).all() and torch.equal(found, weight), name


def test_what_the_caller_gave_is_left_as_it_was(whole):
    assert whole[2].config.use_cache is small_model().config.use_cache


# --- interrupted and resumed


def same_run(first, second):
    """The same log but for times, and the same weights to the bit."""
    assert without_time(read_log(first / "log.jsonl")) == without_time(read_log(second / "log.jsonl"))
    ours, theirs = weights_in(first), weights_in(second)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("step", (1, 5, 6))
def test_a_crashed_run_resumes_to_the_same_bits(whole, data, tmp_path, monkeypatch, step):
    """It dies after step 1, 5 or 6: before any checkpoint, between two, and while one is being written."""
    from deltamem_fast.training import trainer

    options = {"evaluate": [data], "steps": 8, "accumulate": 2, "save_every": 3, "keep": 9}
    place = "mark_whole" if step == 6 else "Meter"

    def dies(*arguments):
        raise Stopped

    class Dying(trainer.Meter):
        calls = 0

        def take(self, *arguments):
            self.calls += 1
            return dies() if self.calls > step else super().take(*arguments)

    original = trainer.mark_whole
    mark = lambda path, at: original(path, at) if at < step else dies()  # noqa: E731
    with monkeypatch.context() as patched:
        patched.setattr(trainer, place, mark if step == 6 else Dying)
        with pytest.raises(Stopped):
            run(data, tmp_path / "run", **options)
    assert newest_checkpoint(tmp_path / "run") == (None if step == 1 else tmp_path / "run" / "checkpoint-3")
    with open(tmp_path / "run" / "log.jsonl", "a") as log:
        log.write('{"step": 6, "los')  # torn by the crash
    run(data, tmp_path / "run", resume="auto", **options)
    same_run(tmp_path / "run", whole[0])


def test_a_checkpoint_can_be_named(whole, data, tmp_path):
    checkpoint = str(whole[0] / "checkpoint-3")
    run(data, tmp_path, evaluate=[data], steps=8, accumulate=2, save_every=3, keep=9, resume=checkpoint)
    assert [entry["step"] for entry in steps_in(tmp_path)] == [4, 5, 6, 7, 8]
    ours, theirs = weights_in(tmp_path), weights_in(whole[0])
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_batches_may_be_cut_otherwise_when_resuming(whole, data, tmp_path):
    """The same four episodes a step: one forward of them, or four."""
    checkpoint = str(whole[0] / "checkpoint-6")
    run(data, tmp_path, evaluate=[data], steps=8, batch_size=1, accumulate=4, resume=checkpoint)
    for ours, theirs in zip(steps_in(tmp_path), steps_in(whole[0])[6:]):
        assert ours["step"] == theirs["step"] and ours["answer_loss"] == pytest.approx(theirs["answer_loss"], rel=1e-4)


def test_a_finished_run_resumes_to_itself(data, tmp_path):
    run(data, tmp_path, steps=2, save_every=2)
    before = without_time(read_log(tmp_path / "log.jsonl")), weights_in(tmp_path)
    assert run(data, tmp_path, steps=2, save_every=2, resume="auto").steps == 2
    after = without_time(read_log(tmp_path / "log.jsonl")), weights_in(tmp_path)
    assert before[0] == after[0] and all(torch.equal(before[1][name], after[1][name]) for name in before[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed 0 \\(now 1\\)"),
        ({"accumulate": 3}, "episodes_a_step 4 \\(now 6\\)"),
        ({"lr": 1e-3, "gate_target": 0.1}, "gate_target 0.05 \\(now 0.1\\), lr 0.01 \\(now 0.001\\)"),
        ({"adapter": DeltaMemConfig(rank=2)}, "rank 4 \\(now 2\\)"),
    ],
)
def test_another_run_is_not_resumed(whole, data, changes, message):
    options = {"evaluate": [data], "steps": 8, "accumulate": 2, "resume": "auto"} | changes
    with pytest.raises(ValueError, match=f"resume: .* holds a run with {message}"):
        run(data, whole[0], **options)


def test_other_data_is_not_resumed(whole, tmp_path):
    data = write_lines(tmp_path / "other.jsonl", recall_lines(11))
    with pytest.raises(ValueError, match="resume: .* holds a run with other data"):
        run(data, whole[0], evaluate=[data], steps=8, accumulate=2, resume="auto")


def test_a_run_is_not_written_over(whole, data, tmp_path):
    before = (whole[0] / "log.jsonl").read_bytes()
    with pytest.raises(ValueError, match="output: .* holds a training run; --resume goes on with it"):
        run(data, whole[0])
    assert (whole[0] / "log.jsonl").read_bytes() == before
    with pytest.raises(ValueError, match="resume: got .*nowhere, which is no whole checkpoint"):
        run(data, tmp_path, resume=str(tmp_path / "nowhere"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="output: got .*file, which is a file"):
        run(data, tmp_path / "file")


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
def test_a_signal_stops_the_run_with_a_checkpoint(whole, data, tmp_path, monkeypatch, capsys, number):
    from deltamem_fast.training import trainer

    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals come to the main thread only")
    options = {"evaluate": [data], "steps": 8, "accumulate": 2, "save_every": 3, "keep": 9}
    compute_loss = trainer.DeltaMemTrainer.compute_loss

    def interrupted(self, *arguments, **keywords):
        if self.state.global_step == 3:
            signal.raise_signal(number)
        return compute_loss(self, *arguments, **keywords)

    with monkeypatch.context() as patched:
        # Comes twice in that step, and the second time would raise at once.
        patched.setattr(trainer.DeltaMemTrainer, "compute_loss", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(data, tmp_path / "twice", **options)
        once = iter([number])
        patched.setattr(signal, "raise_signal", lambda n, raised=signal.raise_signal: [raised(x) for x in once])
        result = run(data, tmp_path / "run", **options)
    assert result.interrupted and result.checkpoint == tmp_path / "run" / "checkpoint-4" and result.steps == 4
    assert "stopping after this step" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    # What is there is a checkpoint, not an adapter that looks finished.
    assert not (tmp_path / "run" / "delta_mem_adapter.safetensors").exists()
    run(data, tmp_path / "run", resume="auto", **options)
    same_run(tmp_path / "run", whole[0])


# --- options, log and curves

WRONG_OPTIONS = {
    "batch_size": (0, "an integer, 1 or more"),
    "accumulate": (1.5, "an integer, 1 or more"),
    "steps": (0, "an integer, 1 or more"),
    "write_length": (True, "an integer, 1 or more"),
    "seed": (-1, "an integer, 0 or more"),
    "lr": (0.0, "a number, more than 0"),
    "epochs": (float("nan"), "a number, more than 0"),
    "gate_weight": (-0.1, "a number, 0 or more"),
    "warmup": (1.5, "a number, 0 to 1"),
    "no_memory_probability": (-0.1, "a number, 0 to 1"),
    "over_long": ("cut", "error, skip"),
    "report_to": (("mlflow",), "tensorboard, wandb"),
}


@pytest.mark.parametrize("name", WRONG_OPTIONS)
def test_options_are_checked(name):
    value, allowed = WRONG_OPTIONS[name]
    with pytest.raises(ValueError, match=f"{name}: got .*, allowed {allowed}"):
        TrainingOptions(output="x", **{name: value})


def test_options_that_do_not_go_together():
    with pytest.raises(
        ValueError, match=r"no_memory_probability: with state_only_probability it makes 1\.\d+, allowed 1"
    ):
        TrainingOptions(output="x", no_memory_probability=0.7, state_only_probability=0.4)
    with pytest.raises(ValueError, match="reentrant: given without gradient_checkpointing"):
        TrainingOptions(output="x", reentrant=True)


def test_a_package_that_is_missing_is_named(data, tmp_path, monkeypatch):
    from deltamem_fast.training import run as module

    monkeypatch.setattr(module, "find_spec", lambda name: None if name.startswith("tensorboard") else name)
    with pytest.raises(ValueError, match="report_to: tensorboard is not installed"):
        run(data, tmp_path / "out", report_to=("tensorboard",))
    assert not (tmp_path / "out").exists()


def test_a_patched_model_is_refused(data, tmp_path):
    model = patch_model(small_model(), backend="reference")
    with pytest.raises(ValueError, match="model: already patched"):
        train(model, chatml_tokenizer(), [data], TrainingOptions(output=tmp_path))


def test_epochs_make_steps(data, tmp_path):
    assert run(data, tmp_path, steps=None, epochs=1.5, batch_size=2, accumulate=4).total_steps == 3  # 18 / 8


def test_a_log_goes_on_where_it_left_off(tmp_path):
    log = TrainingLog(tmp_path / "log.jsonl")
    log.start(0)
    for step in (1, 2, 3):
        log.write({"step": step, "loss": float("nan") if step == 1 else 1.0})
    with open(log.path, "a") as file:
        file.write('{"step": 4, "lo')
    assert [entry["step"] for entry in read_log(log.path)] == [1, 2, 3]
    log.start(2)
    log.write({"step": 3, "loss": 2.0})
    assert [(entry["step"], entry["loss"]) for entry in read_log(log.path)] == [(1, "nan"), (2, 1.0), (3, 2.0)]
    log.path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"log\.jsonl:2: not an entry of a training log"):
        read_log(log.path)
    log.start(0)
    assert log.path.read_text() == ""


def test_a_log_is_read_line_by_line_and_not_trusted(tmp_path):
    log = TrainingLog(tmp_path / "log.jsonl")
    log.write({"step": 1, "evaluation": {"a\u2028b.jsonl": {}}})
    log.write({"step": 2})
    assert [entry["step"] for entry in read_log(log.path)] == [1, 2]
    for line in ("[" * 99999, '{"step": true}', "{}"):
        log.path.write_text(line + "\n")
        with pytest.raises(FileFormatError, match=r"log\.jsonl:1: not an entry of a training log"):
            read_log(log.path)


def test_a_damaged_checkpoint_does_not_keep_a_run_from_going_on(tmp_path):
    for step, content in ((1, '{"step": 1}'), (2, "{}"), (3, '{"step": null}'), (4, '{"step": "x"}'), (5, "nonsense")):
        checkpoint = tmp_path / f"checkpoint-{step}"
        checkpoint.mkdir()
        for name, text in ((WHOLE_NAME, content), (CONFIG_NAME, ""), (SAFETENSORS_NAME, "")):
            (checkpoint / name).write_text(text)
        if step > 1:
            with pytest.raises(FileFormatError, match=f"checkpoint-{step}/checkpoint.json"):
                step_of(checkpoint)
    assert newest_checkpoint(tmp_path).name == "checkpoint-1"
    one = Run("m", "float32", {}, "0", 1, {})
    one.save(tmp_path)
    one.check(tmp_path)
    (tmp_path / "training.json").write_text('{"model": "m", "adapter": null}')
    with pytest.raises(FileFormatError, match="adapter: got NoneType, allowed an object"):
        one.check(tmp_path)


def test_curves_of_a_log_with_gaps(tmp_path):
    step = {"loss": 2.0, "answer_loss": 2.0, "mean_beta": [0.1, 0.2], "learning_rate": 1.0, "grad_norm": 1.0}
    entries = [{"step": 1} | step, {"step": 2} | step | {"answer_loss": "nan", "grad_norm": "inf"}, {"step": 3} | step]
    entries.append({"step": 3, "evaluation": {"a/b.jsonl": {"loss": 1.0, "no_memory_loss": 2.0}}})
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    target = draw_curves(tmp_path / "log.jsonl", tmp_path / "deep" / "curves.png")
    assert target.read_bytes().startswith(b"\x89PNG")
    (tmp_path / "log.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds no training step"):
        draw_curves(tmp_path / "log.jsonl", target)


def test_smoothing_has_no_bias_at_its_start():
    assert smoothed([3.0, 3.0, float("nan"), 3.0]) == pytest.approx([3.0] * 4)
    assert smoothed([0.0, 1.0], keep=0.5) == pytest.approx([0.0, 2 / 3])


def test_over_long_examples_are_left_out_aloud(tmp_path, capsys):
    lines = [*recall_lines(4), {"messages": chat("x" * 300, "ok", "what?", "a")}]
    data = write_lines(tmp_path / "d.jsonl", lines)
    with pytest.raises(
        ValueError, match=r"1 of 5 examples are over-long: .*d\.jsonl:5: the write part has 3\d\d tokens"
    ):
        run(data, tmp_path / "a", write_length=100)
    assert not (tmp_path / "a").exists()
    run(data, tmp_path / "b", write_length=100, over_long="skip", steps=1)
    assert "d.jsonl:5: the write part has" in capsys.readouterr().err
    assert "1 over-long ones left out" in (tmp_path / "b" / "README.md").read_text()


def test_the_readme_snippet_loads_into_another_dtype(whole):
    model = tiny_model(vocab_size=len(chatml_tokenizer()), hidden_size=32, num_hidden_layers=2, dtype=torch.bfloat16)
    patch_model(model, whole[0], backend="reference")
    load_adapter(model, whole[0] / "checkpoint-3")


def test_data_that_writes_nothing_is_refused_and_half_of_it_warned_of(tmp_path, caplog):
    nothing = [{"messages": chat("what?", letter)} for letter in "abc"]
    blank = [{"write": chat(" "), "read": chat("what?"), "answer": "a"}]
    data = write_lines(tmp_path / "nothing.jsonl", nothing + blank)
    with pytest.raises(ValueError, match=r"nothing\.jsonl: 4 of 4 examples have no write context, so that nothing"):
        run(data, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    some = write_lines(tmp_path / "some.jsonl", nothing + recall_lines(2))
    with caplog.at_level("WARNING", "deltamem_fast"):
        run(some, tmp_path / "out", evaluate=[data], steps=1)
    texts = [record.getMessage() for record in caplog.records if record.name == "deltamem_fast"]
    assert [text.split("/")[-1].split(",")[0] for text in texts] == [
        "some.jsonl: 3 of 5 examples have no write context",
        "nothing.jsonl: 4 of 4 examples have no write context",
    ]


def test_turns_that_only_state_only_episodes_write_are_enough(tmp_path):
    data = write_lines(tmp_path / "two.jsonl", [{"messages": chat("it is a.", "ok", "what?", "a")}] * 2)
    with pytest.raises(ValueError, match="no write context"):
        run(data, tmp_path / "out", visible_turns=2, state_only_probability=0.0)
    assert run(data, tmp_path / "out", visible_turns=2, state_only_probability=0.5, steps=1).steps == 1
