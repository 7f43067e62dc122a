"""The command ``deltamem train``."""

from __future__ import annotations

import argparse
import json
import os
import sys

from deltamem_kernels.dispatch import BACKENDS

from ..adapter.files import read_adapter
from ..config import DELTA_HEADS, GRANULARITIES, OUTPUT_INITS, STATE_UPDATE_MODES, DeltaMemConfig
from ..errors import ArgumentError
from ..model.loading import load_model
from ..storage.files import as_path, opened
from ..training.lengths import OVER_LONG
from ..training.options import DTYPES, REPORTERS, TrainingOptions

INTERRUPTED = 130
_DEFAULTS = TrainingOptions(output=".")
_CONFIG = DeltaMemConfig()

_DESCRIPTION = """\
Trains an adapter: each episode's write context goes through the model once and fills the memory, then the visible
turns are answered from it, and the answer's cross-entropy is differentiated through all of that. Only the adapter is
trained, in float32. The defaults are the released recipe. Several devices: accelerate launch -m deltamem_fast train …
(DDP, FSDP 2 and DeepSpeed by accelerate's configuration), or torchrun.
"""
_EPILOG = """\
DATA is JSON lines, each {"messages": [{"role": …, "content": …}, …]}: the last message is the answer, the last user
turn before it is read, all before that is written; or {"write": [messages], "read": [messages], "answer": "…"}.
DIR gets the adapter, README.md, log.jsonl, curves.png and checkpoints; Ctrl-C saves one, and --resume goes on from it.
"""


def add_command(commands) -> None:
    """Add ``train`` to the subparsers of ``deltamem``."""
    train = commands.add_parser(
        "train",
        help="train an adapter on chat messages",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument("model", metavar="MODEL", help="the backbone: a directory or hub id, or smollm2")
    train.add_argument("data", metavar="DATA", nargs="+", help="JSONL files")
    train.add_argument("--output", metavar="DIR", required=True, help="where the run is kept")
    train.add_argument("--evaluate", metavar="FILE", action="append", default=[], help="a held-out file (repeatable)")

    group = train.add_argument_group("adapter")
    group.add_argument("--adapter", metavar="DIR", help="train on from this adapter (a directory or hub id)")
    group.add_argument("--strategy", choices=("tsw", "ssw", "msw"), help="every token, segments, several states (tsw)")
    group.add_argument("--granularity", choices=GRANULARITIES[1:], help="of ssw (message_mean)")
    group.add_argument("--heads", type=int, metavar="H", help="states a layer, of msw (4)")
    group.add_argument("--rank", type=int, metavar="R", help=f"({_CONFIG.rank})")
    group.add_argument("--alpha", type=float, metavar="A", help=f"corrections are scaled by A / R ({_CONFIG.alpha:g})")
    group.add_argument(
        "--delta-heads", metavar="LIST", help=f"what is corrected, of {','.join(DELTA_HEADS)} ({','.join('qo')})"
    )
    group.add_argument("--output-init", choices=OUTPUT_INITS, help=f"({_CONFIG.output_init})")
    group.add_argument("--state-update-mode", choices=STATE_UPDATE_MODES, help=f"({_CONFIG.state_update_mode})")

    group = train.add_argument_group("episodes")
    _option(group, "--write-length", int, "N", "the most tokens of a write context")
    _option(group, "--read-length", int, "N", "the most tokens of a read part with its answer")
    _option(group, "--over-long", OVER_LONG, "", "what to do with an example beyond that; nothing is cut")
    _option(group, "--visible-turns", int, "N", "user turns that the read part shows")
    _option(group, "--state-only-probability", float, "P", "of showing the last user turn alone")
    _option(group, "--no-memory-probability", float, "P", "of reading an empty memory, without a gradient")

    group = train.add_argument_group("recipe")
    group.add_argument("--steps", type=int, metavar="N", help="optimizer steps (as many as --epochs take)")
    _option(group, "--epochs", float, "N", "passes over the data")
    _option(group, "--batch-size", int, "N", "episodes a device and forward")
    _option(group, "--accumulate", int, "N", "forwards a step")
    _option(group, "--lr", float, "X", "peak of the learning rate, which falls as a cosine")
    _option(group, "--warmup", float, "SHARE", "of the steps")
    _option(group, "--weight-decay", float, "X", "")
    _option(group, "--max-grad-norm", float, "X", "0 = gradients are not clipped")
    _option(group, "--gate-weight", float, "W", "of the write-sparsity term W · (mean β − target)²")
    _option(group, "--gate-target", float, "X", "its target")
    _option(group, "--seed", int, "N", "")

    group = train.add_argument_group("machine and record")
    group.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the backbone (%(default)s)")
    group.add_argument("--gradient-checkpointing", action="store_true", help="less memory, one more forward")
    group.add_argument("--reentrant", action="store_true", help="torch's older kind of gradient checkpointing")
    group.add_argument("--backend", choices=BACKENDS, default="auto", help="(%(default)s)")
    group.add_argument("--cpu", action="store_true", help="leave GPUs alone")
    group.add_argument(
        "--resume", metavar="auto|DIR", nargs="?", const="auto", default="",
        help="go on from the newest checkpoint in --output, or from this one",
    )  # fmt: skip
    _option(group, "--save-every", int, "N", "steps between checkpoints, 0 = none but when interrupted")
    _option(group, "--keep", int, "N", "checkpoints that are kept")
    _option(group, "--evaluate-every", int, "N", "steps between evaluations, 0 = at the end alone")
    _option(group, "--workers", int, "N", "processes that tokenise ahead")
    group.add_argument("--report-to", choices=REPORTERS, action="append", default=[], help="besides log.jsonl")
    group.add_argument("--json", action="store_true", help="the result as one JSON object")
    group.add_argument("--no-progress", dest="progress", action="store_false", help="say nothing on the way")
    train.set_defaults(command=_train)


def _option(group, flag: str, kind, metavar: str, text: str) -> None:
    default = getattr(_DEFAULTS, flag[2:].replace("-", "_"))
    text = f"{text} (%(default)s)".strip()
    if isinstance(kind, tuple):
        group.add_argument(flag, choices=kind, default=default, help=text)
    else:
        group.add_argument(flag, type=kind, metavar=metavar, default=default, help=text)


def _train(arguments: argparse.Namespace) -> int:
    options = TrainingOptions(
        **{name: value for name, value in vars(arguments).items() if name in TrainingOptions.__dataclass_fields__}
    )
    adapter = adapter_of(arguments)
    for argument, names in (("DATA", arguments.data), ("--evaluate", arguments.evaluate)):
        for name in names:
            with opened(as_path(name, argument), argument):
                pass
    as_path(arguments.output, "--output")
    if arguments.resume not in ("", "auto"):
        as_path(arguments.resume, "--resume")
    read_adapter(adapter)  # a wrong one is told before gigabytes are read
    from ..training.run import train

    model, tokenizer = load_model(arguments.model, dtype=arguments.dtype, check_tokenizer=_renders_episodes)
    result = train(
        model,
        tokenizer,
        arguments.data,
        options,
        adapter,
        evaluate=arguments.evaluate,
        backend=arguments.backend,
    )
    if int(os.environ.get("RANK", "0")) == 0:
        _say(result, arguments)
    return INTERRUPTED if result.interrupted else 0


def adapter_of(arguments: argparse.Namespace):
    """``--adapter``, or a configuration of the flags that make one.

    Raises:
        ValueError: both, or a flag that its strategy does not have.
    """
    names = ("strategy", "granularity", "heads", "rank", "alpha", "delta_heads", "output_init", "state_update_mode")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if arguments.adapter is not None:
        if given:
            flag = next(iter(given)).replace("_", "-")
            raise ArgumentError(f"--{flag}: given with --adapter, whose configuration says it")
        return arguments.adapter
    strategy = given.pop("strategy", "tsw")
    for name, needed in (("granularity", "ssw"), ("heads", "msw")):
        if name in given and strategy != needed:
            raise ArgumentError(f"--{name}: got {given[name]!r} with --strategy {strategy}, allowed with {needed} only")
    if "delta_heads" in given:
        given["delta_heads"] = tuple(given["delta_heads"].split(","))
    return DeltaMemConfig.preset(strategy, **given)


def _renders_episodes(tokenizer) -> None:
    if not tokenizer.chat_template:
        name = tokenizer.name_or_path
        raise ArgumentError(f"MODEL: the tokenizer of {name} has no chat template, which episodes are rendered with")


def _say(result, arguments: argparse.Namespace) -> None:
    if arguments.json:
        print(json.dumps(vars(result), indent=2, default=str))  # paths as text
    elif not result.interrupted:
        for name, found in result.evaluation.items():
            print(f"{name}: loss of the answers {found['loss']:.4f}, without memory {found['no_memory_loss']:.4f}")
        print(f"{result.output}: the adapter after {result.steps:,} steps; patch_model(model, {str(result.output)!r})")
    if result.interrupted:
        print(
            f"deltamem: interrupted after step {result.steps} of {result.total_steps}; saved {result.checkpoint}; the "
            "same command with --resume goes on",
            file=sys.stderr,
        )
