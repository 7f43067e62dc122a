"""A training run, from data files to an adapter."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from torch import nn

from ..adapter.card import short_names
from ..adapter.files import AdapterSource, load_adapter, read_adapter
from ..adapter.fingerprints import backbone_name, hub_id
from ..adapter.record import is_patched
from ..adapter.wrappers import unwrap
from ..errors import ArgumentError
from ..model.patch import patch_model
from ..notices import logger
from ..storage.files import write_text
from .callbacks import ProgressCallback, StopCallback, checking
from .card import CARD_NAME, model_card
from .checkpoints import RUN_NAME, Run, checkpoint_to_resume, checkpoints_in, step_of
from .data import ExampleFiles
from .episode import EpisodeSchedule, build_episode
from .lengths import Checked, check_lengths
from .log import CURVES_NAME, LOG_NAME, TrainingLog, draw_curves
from .options import TrainingOptions
from .setup import prepare_for_training


@dataclass(frozen=True)
class TrainingResult:
    """What came of a run.

    Attributes:
        output: its directory; holds the adapter unless the run was interrupted.
        steps: how many steps the adapter has been trained, of ``total_steps``.
        checkpoint: where an interrupted run can go on from, else None.
        evaluation: by held-out file, ``loss`` and ``no_memory_loss`` of the last evaluation.
    """

    output: Path
    steps: int
    total_steps: int
    checkpoint: Path | None
    evaluation: dict[str, dict[str, float]]

    @property
    def interrupted(self) -> bool:
        """Whether a signal stopped the run before its end."""
        return self.checkpoint is not None


def train(
    model: nn.Module,
    tokenizer,
    data: Sequence[str | os.PathLike],
    options: TrainingOptions,
    adapter=None,
    *,
    evaluate: Sequence[str | os.PathLike] = (),
    backend: str = "auto",
) -> TrainingResult:
    """Train an adapter on episodes and save it.

    The backbone is frozen and keeps its dtype; the adapter is trained in float32. Under torchrun or accelerate every
    process calls this. SIGINT and SIGTERM end the run after the step, with a checkpoint to resume from.

    Args:
        model: a causal language model, not patched.
        tokenizer: with a chat template.
        data: JSONL files (see ``deltamem_fast.training.data``).
        options: of the run.
        adapter: what ``patch_model`` takes: a directory or hub id to train on from, a DeltaMemConfig, or None.
        evaluate: held-out files.
        backend: of the memory's operations.

    Returns:
        What came of it. ``options.output`` then holds the adapter (``patch_model(model, output)`` loads it), a
        README.md, ``log.jsonl``, ``curves.png`` where matplotlib is installed, and the last checkpoints.

    Raises:
        ValueError: data or an option that is wrong, a run in ``output`` that is not resumed, or is another one; files
            there that no run has written, and this one would write over; a package that is not installed; or a loss or
            gradient that is not finite: the step is not taken, and the model's adapter is as the step before has left
            it.
        FileNotFoundError: no such file or adapter.
    """
    if is_patched(model):
        raise ArgumentError("model: already patched; allowed a bare one, train patches it")
    _check_installed(options)
    from transformers import set_seed

    checkpoint = checkpoint_to_resume(options)
    _check_output(Path(options.output))
    source = read_adapter(adapter)
    files = ExampleFiles(data, options.visible_turns)
    run = Run(
        model=backbone_name(unwrap(model).config),
        dtype=str(unwrap(model).dtype).removeprefix("torch."),
        adapter=source.config.to_dict(),
        data=files.digest,
        episodes_a_step=options.batch_size * options.accumulate * _world_size(),
        options=options.to_dict(),
    )
    if checkpoint is not None:
        run.check(checkpoint.parent)
    build = partial(build_episode, tokenizer, source.config)
    checked = _checked(files, build, options, "data", options.kinds)
    # What is written has the files' names without their folders; the result goes by what was given.
    paths = dict(zip(short_names(evaluate), map(str, evaluate)))
    held_out = {
        name: _checked(ExampleFiles([path], options.visible_turns), build, options, path)
        for name, path in paths.items()
    }
    set_seed(options.seed)
    _prepare(model, adapter, source, checkpoint, backend, options)
    result = _train(model, tokenizer, run, checked, held_out, build, options, checkpoint)
    return replace(result, evaluation={paths[name]: found for name, found in result.evaluation.items()})


def _check_output(output: Path) -> None:
    """Raise if a first run would write over, or delete, what no run of ours has written.

    Such as a project's README.md, data called log.jsonl, or another trainer's checkpoints, of which the last few stay.
    """
    if (output / RUN_NAME).is_file():
        return
    there = [name for name in (CARD_NAME, LOG_NAME, CURVES_NAME) if os.path.lexists(output / name)]
    there += sorted(path.name for path in checkpoints_in(output))
    if there:
        raise ArgumentError(
            f"output: {output} holds {', '.join(there[:3])}{', …' if len(there) > 3 else ''} and no training run, "
            "which would write over that or delete it; allowed: another directory"
        )


def _check_installed(options: TrainingOptions) -> None:
    needed = [("training", ("accelerate",))]
    needed += [("report_to", {"tensorboard": ("tensorboard", "tensorboardX")}.get(n, (n,))) for n in options.report_to]
    for name, packages in needed:
        if not any(find_spec(package) for package in packages):
            raise ArgumentError(f"{name}: {packages[0]} is not installed, which it needs (pip install {packages[0]})")


def _check_writes(checked: Checked, name: str, *, trains: bool) -> None:
    """Raise if nothing is ever written, and warn if most is not: the memory stays empty then, and learns nothing."""
    total, empty = len(checked.examples), checked.empty_writes
    what = f"{name}: {empty:,} of {total:,} examples have no write context"
    form = (
        'allowed: chats with turns before those that are shown (see visible_turns), or "write" with messages that say '
        "something"
    )
    if trains and empty == total:
        raise ArgumentError(f"{what}, so that nothing would be written and nothing trained; {form}")
    if 2 * empty > total:
        logger.warning("%s, and read an empty memory; %s", what, form)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _checked(examples: ExampleFiles, build, options: TrainingOptions, name: str, kinds=("both",)) -> Checked:
    shown = options.progress and _rank() == 0
    checked = check_lengths(
        examples,
        build,
        write_length=options.write_length,
        read_length=options.read_length,
        over_long=options.over_long,
        kinds=kinds,
        progress=partial(checking, shown=shown),
    )
    trains = name == "data"
    _check_writes(checked, ", ".join(map(str, examples.paths)), trains=trains)
    if _rank() == 0:
        for item in checked.over_long:
            print(f"deltamem: left out: {item}", file=sys.stderr)
        if shown:
            print(f"{name}: {checked}", file=sys.stderr)
    return checked


def _prepare(model, adapter, source: AdapterSource, checkpoint: Path | None, backend: str, options) -> None:
    """Patch, freeze and load: the model is then as it was after the checkpoint's last step."""
    patch_model(model, adapter, backend=backend)
    prepare_for_training(model)
    if checkpoint is not None:
        load_adapter(model, checkpoint)
    elif source.directory is not None:
        load_adapter(model, adapter)  # once more: patching has rounded it to the backbone's dtype
    if options.gradient_checkpointing:
        enable_checkpointing(unwrap(model), options.reentrant)


def enable_checkpointing(model: nn.Module, reentrant: bool) -> None:
    """Have a transformers model recompute its layers in the backward pass, frozen embeddings or not."""
    arguments = {"use_reentrant": reentrant}
    if hasattr(model, "activation_checkpointing_enable"):  # the name since transformers 5.2x
        model.activation_checkpointing_enable(arguments)
    else:
        model.gradient_checkpointing_enable(arguments)
    if reentrant:
        # Its layers get gradients only if their input has one.
        model.enable_input_require_grads()


def _train(model, tokenizer, run, checked, held_out, build, options, checkpoint) -> TrainingResult:
    from .trainer import DeltaMemTrainer, EpisodeList, EpisodeModel, training_arguments

    output, episodes = Path(options.output), options.epochs * len(checked.examples)
    steps = options.steps or max(1, math.ceil(episodes / run.episodes_a_step))
    log = TrainingLog(output / LOG_NAME)
    arguments = training_arguments(options, steps, bool(held_out))
    schedule = EpisodeSchedule(
        checked.examples,
        build,
        steps * run.episodes_a_step,
        options.seed,
        options.state_only_probability,
        options.no_memory_probability,
    )
    stop = StopCallback(alone=_world_size() == 1)
    trainer = DeltaMemTrainer(
        EpisodeModel(model, options.gate_weight, options.gate_target),
        arguments,
        schedule,
        {name: EpisodeList(found.examples, build) for name, found in held_out.items()},
        log,
        pad_token_id=tokenizer.pad_token_id or 0,
        callbacks=[stop, ProgressCallback(options.progress)],
    )
    if trainer.is_world_process_zero():
        run.save(output)
        log.start(0 if checkpoint is None else step_of(checkpoint))
    with stop.listening():
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    steps_done = trainer.state.global_step
    evaluation = trainer.evaluations.get(max(trainer.evaluations, default=0), {})
    if not stop.stopped:
        trainer.save_model(str(output))
    if trainer.is_world_process_zero():
        try:
            draw_curves(output / LOG_NAME, output / CURVES_NAME)
        except ImportError as error:
            print(f"deltamem: no curves drawn: {error} (pip install deltamem-fast[train])", file=sys.stderr)
        if not stop.stopped:
            base = hub_id(getattr(unwrap(model).config, "_name_or_path", None))
            card = model_card(run, base, checked, steps_done, evaluation)
            write_text(output / CARD_NAME, card, private=False)
    trainer.accelerator.wait_for_everyone()
    interrupted_at = output / f"checkpoint-{steps_done}" if stop.stopped else None
    return TrainingResult(output, steps_done, steps, interrupted_at, evaluation)
