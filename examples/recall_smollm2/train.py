"""Training of one adapter: answers from memory, keys that keep facts apart, silence where there is nothing to say."""

from __future__ import annotations

import itertools
import json
import math
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random

import torch
from torch import nn

from deltamem_fast import DeltaMemConfig, MemoryState, patch_model, save_adapter
from deltamem_fast.storage.files import read_json, write_json
from deltamem_fast.training.setup import prepare_for_training

try:
    import resource
except ImportError:  # Windows
    resource = None

from .calibrate import calibrate, estimated_seconds
from .pool import ROWS, Encoder, Pool
from .recall import recall
from .start import clear_nulls, quieten, structured_start
from .trainee import Kept, TextLosses, Trainee

# How many facts episodes have, level by level. One at first: what a memory passes on is learnt sooner where no other
# fact is in the way.
LEVELS = ((1,), (1, 2), (1, 2, 4), (1, 2, 4, 8))
PROMOTED = 0.5  # the share of right values over the last steps at which the next level comes
# The second checkpoint is of the last step at the full rate: what a longer run of the same options goes on from.
CHECKPOINT, CONSTANT, LOG, ABOUT = "checkpoint.pt", "constant.pt", "log.jsonl", "training.json"
WARMUP = 50  # steps
VERSION = 3  # of facts and losses: a run of another one is not gone on with
LOGGED = 20  # steps of a line in the log
CHECKED = 40  # steps between looks at held-out episodes


@dataclass(frozen=True)
class TrainOptions:
    """How an adapter is trained.

    Attributes:
        steps: in all.
        lr: AdamW's; warmed up, constant, then linearly down to a fiftieth.
        decay: the last share of the steps, in which the rate goes down. Until then a run does not depend on ``steps``,
            and can be prolonged.
        divergence_weight: of KL(frozen ‖ with memory) on text without a fact that is told behind the facts.
        overlap_weight: of what the keys of a step's facts have in common, and of the null directions; see pointing.py.
        noise_weight: of what queries have beside their null direction, in that text.
        erased_weight: of what a token of that text erases of facts.
        quiet_from: the step from which on queries are quietened and both count: they find keys first.
        any_word: most values are any word at all; otherwise all are of the relations' own lists.
        pool: episodes of each count.
        clip: of the gradient's norm.
        seed: of weights and data.
        save_every: steps between checkpoints.
    """

    steps: int = 1000
    lr: float = 3e-3
    decay: float = 0.4
    divergence_weight: float = 10.0
    overlap_weight: float = 3.0
    noise_weight: float = 6.0
    erased_weight: float = 30.0
    quiet_from: int = 300
    any_word: bool = True
    pool: int = 2000
    clip: float = 1.0
    seed: int = 0
    save_every: int = 50


def drawn_of(step: int, level: int, options: TrainOptions) -> tuple[int, bool]:
    """Of a step: how many facts, and whether contexts begin with the default system message.

    That is half of a short context's tokens, so most steps do without; in the last share, half of them.
    """
    random = Random(f"{options.seed} {step}")
    share = 0.5 if step >= constant_steps(options) else 0.2
    return random.choice(LEVELS[level]), random.random() < share


def learning_rate(step: int, options: TrainOptions) -> float:
    """Of a step, counted from 0: linear warm-up, constant, linear decay."""
    left = (options.steps - step) / (options.steps - constant_steps(options))
    return options.lr * min((step + 1) / WARMUP, max(0.02, min(1.0, left)))


def constant_steps(options: TrainOptions) -> int:
    """The steps before the last share, which do not depend on how many there are in all."""
    return int((1 - options.decay) * options.steps)


def settles(step: int) -> bool:
    """Whether a step tells ordinary text behind the facts, too: every other one does.

    Every fourth has a divergence four times as large when as many values are right, whatever its weight.
    """
    return step % 2 == 1


@dataclass(frozen=True)
class StepLosses:
    """What a step comes to; float32 scalars on the graph but for ``right``.

    Attributes:
        answer: of the answers; see ``Trainee.answer``.
        right: bool, which values were likeliest.
        overlap: of the keys; see pointing.py.
        text: what is told behind the facts; None in steps without.
    """

    answer: torch.Tensor
    right: torch.Tensor
    overlap: torch.Tensor
    text: TextLosses | None

    def total(self, step: int, options: TrainOptions) -> torch.Tensor:
        """What is minimized in a step."""
        found = self.answer + options.overlap_weight * self.overlap
        if self.text is not None:
            found = found + options.divergence_weight * self.text.divergence
            if step >= options.quiet_from:
                found = found + options.noise_weight * self.text.noise + options.erased_weight * self.text.erased
        return found


def step_losses(trainee: Trainee, pool: Pool, step: int, level: int, options: TrainOptions) -> StepLosses:
    """Tell a step's facts, ask for them, and, in every other step, tell a text behind them."""
    told, asked = zip(*pool.step(step, *drawn_of(step, level, options)))
    memory = MemoryState.zeros(trainee.model, len(told))
    overlap = trainee.tell(told, memory)
    text = None
    if settles(step):
        # Behind every other row's facts; the other rows' are asked for at once.
        texted = range(0, len(told), 2)
        memories = memory.select(texted), memory.select(range(1, len(told), 2))
        text = trainee.text(pool.texts(step, len(texted)), memories[0], Random(step))
        memory, asked = MemoryState.cat(memories), asked[0::2] + asked[1::2]
    return StepLosses(*trainee.answer(asked, memory), overlap, text)


def estimate(trainee: Trainee, pool: Pool, options: TrainOptions, done: int = 0) -> float:
    """Seconds that the steps behind the ``done`` ones take, and what comes after the last.

    From two steps of each size of the last level: the first runs the lower layers, too. An overestimate where levels of
    fewer facts take long. The parameters stay as they are.
    """
    first, again = [], []
    for count in LEVELS[-1]:
        for times in (first, again):
            began = time.monotonic()
            told, asked = zip(*pool.step(0, count, True))
            memory = MemoryState.zeros(trainee.model, len(told))
            trainee.tell(told, memory)
            loss, right = trainee.answer(asked, memory)
            loss.backward()
            right.tolist()  # waits for the device
            times.append(time.monotonic() - began)
    trainee.model.zero_grad()
    lower = sum((a - b) * options.pool / ROWS[count] for a, b, count in zip(first, again, LEVELS[-1]))
    # Every other step reads a text, too, which costs about half as much.
    steps = (options.steps - done) * 1.25 * sum(again) / len(again)
    return lower + steps + estimated_seconds(trainee, pool)


def train(
    model: nn.Module, tokenizer, config: DeltaMemConfig, options: TrainOptions, output: Path,
    seconds: float = math.inf, kept: Kept | None = None,
) -> bool:  # fmt: skip
    """Train, or go on with, an adapter; ``output`` gets checkpoint, log, and the adapter as it then is.

    After the last step it is calibrated; see calibrate.py.

    Args:
        model: frozen and not patched, on its device.
        seconds: of steps, after which it stops, with a checkpoint.
        kept: see ``Trainee``; what one adapter's training has computed of the frozen model serves the next one's.

    Returns:
        Whether all steps are done.

    Raises:
        ValueError: ``output`` holds a run of another version or with other options, or one past the step at which the
            rate falls when there are ``steps``.
    """
    torch.manual_seed(options.seed)
    encoder = Encoder(tokenizer, config)
    prepare_for_training(patch_model(model, config))
    kept = Kept() if kept is None else kept
    trainee = Trainee(model, config, kept)
    pool = Pool(encoder, options.pool, options.seed, any_word=options.any_word)
    checked = Pool(encoder, 24, options.seed, held_out=True)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=options.lr, weight_decay=0.0, betas=(0.9, 0.98))
    output.mkdir(parents=True, exist_ok=True)
    first, spent, level, found, (peak, peak_from) = _resume(output, config, options, trained, optimizer)
    if not first:
        structured_start(model, encoder, pool.words, options.seed, kept.seen)
    if first < options.steps:
        minutes = estimate(trainee, pool, options, first) / 60
        steps = f"{options.steps - first} steps" + (f" after {first}" if first else "")
        print(f"{output.name}: {steps}, about {minutes:.0f} minutes on {model.device}", file=sys.stderr)
    _cut(output / LOG, first)
    began, sums, done = time.monotonic() - spent, _Sums(found), first
    for step in range(first, options.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options)
        losses = step_losses(trainee, pool, step, level, options)
        optimizer.zero_grad()
        losses.total(step, options).backward()
        clear_nulls(model, gradients=True)  # else they would shorten the others when clipped
        nn.utils.clip_grad_norm_(trained.values(), options.clip, error_if_nonfinite=True)
        optimizer.step()
        clear_nulls(model)
        done, now = step + 1, time.monotonic() - began
        if done >= options.quiet_from:
            quieten(model)
        sums.add(losses)
        stopped = now - spent > seconds
        if done % LOGGED == 0:
            entry = {"step": done, "level": level, **sums.means(), "seconds": round(now)}
            if done % CHECKED == 0:
                entry["held_out"] = round(recall(trainee, checked, LEVELS[level])[0], 4)
            if entry["right"] >= PROMOTED and level + 1 < len(LEVELS):
                level += 1
            with (output / LOG).open("a") as file:
                file.write(json.dumps(entry) + "\n")
            print(f"{output.name}: {entry}", file=sys.stderr, flush=True)
        due = {
            CONSTANT: done == constant_steps(options),
            CHECKPOINT: done % options.save_every == 0 or stopped or done == options.steps,
        }
        for name in (name for name, is_due in due.items() if is_due):
            peak = _larger(peak, _peak_bytes(model.device))
            place = done, now, level, sums.found
            _save(output / name, place, (peak, peak_from), config, options, trained, optimizer)
        if stopped:
            break
    model.eval()
    if first >= options.steps and _is_written(output, first):
        return True
    # The checkpoint stays as trained: a longer run goes on from that.
    trained_at = time.monotonic()
    tried = calibrate(trainee, pool) if done >= options.steps else []
    about = {
        "steps": done,
        "options": asdict(options),
        "device": _device(model),
        "peak_bytes": _larger(peak, _peak_bytes(model.device)),
        "peak_from": peak_from,
        "calibration": [asdict(found) for found in tried],
        "calibration_seconds": round(time.monotonic() - trained_at),
    }
    # Last, so that the file is there for a whole adapter only.
    (output / ABOUT).unlink(missing_ok=True)
    save_adapter(model, output)
    write_json(output / ABOUT, about, private=False)
    return done >= options.steps


def _is_written(output: Path, steps: int) -> bool:
    """Whether the adapter of a run's last step lies there."""
    return (output / ABOUT).is_file() and read_json(output / ABOUT)["steps"] == steps


def _device(model: nn.Module) -> str:
    device = model.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU cores"


def _peak_bytes(device: torch.device) -> int | None:
    """Of this process's memory on the device, since it began; None where it is not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _larger(peak: int | None, other: int | None) -> int | None:
    return max(filter(None, (peak, other)), default=None)


def _cut(log: Path, steps: int) -> None:
    """Leave of a log what was written up to a step: a run may go on from before its last one."""
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True) if log.exists() else []
    log.write_text("".join(line for line in lines if json.loads(line)["step"] <= steps), encoding="utf-8")


class _Sums:
    """Means of the steps since the last look; one wait for the device a look."""

    NAMES = ("answer_loss", "right", "overlap", *TextLosses._fields)

    def __init__(self, found: dict[str, list[torch.Tensor]] | None = None):
        self.found = self._nothing() if found is None else found

    def _nothing(self) -> dict[str, list[torch.Tensor]]:
        return {name: [] for name in self.NAMES}

    def add(self, losses: StepLosses) -> None:
        self.found["answer_loss"].append(losses.answer.detach())
        self.found["right"].append(losses.right.float())
        self.found["overlap"].append(losses.overlap.detach())
        if losses.text is not None:
            for name, value in losses.text._asdict().items():
                self.found[name].append(value.detach())

    def means(self) -> dict[str, float]:
        found = {name: torch.hstack(each).mean().item() for name, each in self.found.items() if each}
        self.found = self._nothing()
        return {name: round(value, 4) for name, value in found.items()}


def _identity(config: DeltaMemConfig, options: TrainOptions) -> str:
    """What a run must have in common with its checkpoint; its length may change."""
    free = asdict(replace(options, steps=0, save_every=0))
    return json.dumps({"version": VERSION, "config": config.to_dict(), "options": free}, sort_keys=True)


def _differing(theirs: str, ours: str) -> str:
    """What of two runs' identities differs: ``seed 0 (now 1)``."""
    theirs, ours = (each["config"] | each["options"] for each in map(json.loads, (theirs, ours)))
    return ", ".join(f"{k} {theirs.get(k)} (now {v})" for k, v in ours.items() if theirs.get(k) != v)


def _save(
    path: Path,
    place: tuple[int, float, int, dict[str, list[torch.Tensor]]],
    peak: tuple[int | None, int],
    config: DeltaMemConfig,
    options: TrainOptions,
    trained: dict,
    optimizer,
) -> None:
    state = {
        "place": place, "peak": peak, "steps": options.steps, "identity": _identity(config, options),
        "optimizer": optimizer.state_dict(), "adapter": {name: p.detach() for name, p in trained.items()},
    }  # fmt: skip
    torch.save(state, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def _resume(output: Path, config: DeltaMemConfig, options: TrainOptions, trained: dict, optimizer):
    """A checkpoint, which is loaded: steps done, seconds, level, sums, and peak with the step that it is from."""
    path = output / CHECKPOINT
    if not path.is_file():
        path = output / CONSTANT
    if not path.is_file():
        return 0, 0.0, 0, None, (None, 0)
    state = torch.load(path, map_location="cpu", weights_only=True)
    if json.loads(state["identity"]).get("version") != VERSION:
        raise ValueError(f"output: {path} is of another version of this training; remove it")
    if state["steps"] != options.steps and state["place"][0] > constant_steps(replace(options, steps=state["steps"])):
        path = output / CONSTANT
        if not path.is_file():
            raise ValueError(f"output: {output} has no {CONSTANT}, from which a run of other steps could go on")
        state = torch.load(path, map_location="cpu", weights_only=True)
    if state["identity"] != _identity(config, options):
        raise ValueError(
            f"output: {path} is of a run with {_differing(state['identity'], _identity(config, options))}; "
            "remove it, or give the same options"
        )
    done = state["place"][0]
    if state["steps"] != options.steps and done > constant_steps(options):
        enough = (n for n in itertools.count(options.steps) if constant_steps(replace(options, steps=n)) >= done)
        raise ValueError(f"steps: got {options.steps}, allowed {next(enough)} or more: {path} is of step {done}")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(state["adapter"][name])
    optimizer.load_state_dict(state["optimizer"])
    _, spent, level, found = state["place"]
    device = next(iter(trained.values())).device
    sums = {name: [each.to(device) for each in kept] for name, kept in found.items()}
    return done, spent, level, sums, state.get("peak", (None, done))
