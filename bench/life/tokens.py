"""Ten million tokens through decode and through scan, beside float64: drift, memory, counters.

Each stream goes through the compiled operators twice, a token at a time (``decode_``) and in chunks (``scan``), and
through the delta rule in float64 from the first token to the last. After every chunk states and reads are compared. A
patched model gets the same text a token at a time and in whole contexts, with a memory that it keeps.
"""

from __future__ import annotations

import argparse
import functools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from deltamem_fast import DeltaMemConfig, MemoryState, patch_model
from deltamem_kernels.dispatch import operations
from deltamem_kernels.layout import HeadLayout, Steering
from deltamem_kernels.rule import DeltaRule

from ..instrument import backbones, commands, results
from ..instrument.rows import Row, counted, refused
from ..speed.model import loud
from .oracle import distance, follow, wrong
from .resident import grown, resident

DIRECTORY = results.DIRECTORY / "life" / "tokens"
FULL = 10_000_000
CHUNK = 8192  # tokens of a row between two looks
CLOSE = 1e-4  # relative, what may have drifted
GROWTH = 8 * 2**20  # bytes that a process may have grown by in the last third of the way
BROKEN_EVERY = 1009  # tokens: one of so many is not finite
MODEL_TOKENS = 60_000
CONTEXT = 256
LAYOUT = HeadLayout(q=2, k=1, v=1, dim=8)


@dataclass(frozen=True)
class Stream:
    """What goes through the operators.

    Attributes:
        name: of the row.
        rows: B. All streams have equally many tokens in all rows together.
        heads: H, of rank 8.
        mode: of the rule; its gates are coupled.
        logit: of every gate, where the same key comes with v and −v by turns; None: random projections, whose sizes
            are those of text.
        share: of the tokens that are asked for.
    """

    name: str
    rows: int = 1
    heads: int = 1
    mode: str = "standard"
    logit: float | None = None
    share: float = 1.0

    @property
    def rule(self) -> DeltaRule:
        """The recurrence."""
        return DeltaRule(rank=8, heads=self.heads, mode=self.mode)

    @property
    def close(self) -> float | None:
        """What may have drifted, relative; None: anything.

        S is in proportion to 1 / (1 − β) where the same key comes again and again, and float32 knows β to half an eps:
        that much is lost whatever computes it. A gate that float32 rounds to 1 lets S grow without end.
        """
        if self.logit is None:
            return CLOSE
        left = 1.0 - 1.0 / (1.0 + math.exp(-self.logit))
        return None if left < 2**-24 else max(CLOSE, 2 * torch.finfo(torch.float32).eps / left)


STREAMS = (
    Stream("text"),
    Stream("text", rows=8),
    Stream("text", rows=8, heads=4),
    Stream("same key, v by turns", rows=4, logit=5.0),
    Stream("same key, v by turns", rows=4, logit=8.0),
    Stream("same key, v by turns", rows=4, logit=12.0, share=0.25),
    Stream("same key, v by turns", rows=4, logit=20.0, share=0.25),
    Stream("text", rows=8, mode="no_lambda", share=0.25),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of ``python -m bench.life tokens``."""
    parser.add_argument("--tokens", type=int, default=FULL, help="of each stream (default: %(default)s)")
    parser.add_argument("--model-tokens", type=int, default=MODEL_TOKENS, help="of the model (default: %(default)s)")


def run(options: argparse.Namespace) -> int:
    """Measure, write, print; the exit status is 1 if something has drifted or grown."""
    for name in ("tokens", "model_tokens"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')}: got {getattr(options, name)}, allowed 1 or more")
    torch.manual_seed(0)
    said = commands.progress()
    rows = []
    for stream in STREAMS:
        rows.append(lived(stream, options.tokens))
        said(f"{stream}: {rows[-1].status} {rows[-1].note}")
    rows.append(model_lived(options.model_tokens))
    quick = options.tokens < FULL or options.model_tokens < MODEL_TOKENS
    return commands.finish(rows, {"quick": quick, "tokens": options.tokens}, options.output)


def chunks(stream: Stream, length: int, chunk: int = CHUNK) -> Iterator[torch.Tensor]:
    """Projections float32 [B, T, W] of ``length`` tokens a row, T at most ``chunk``."""
    rule, make = stream.rule, torch.Generator().manual_seed(1)
    width, rows = rule.read_width, stream.rows
    key, value = (torch.randn(rows, 1, width, generator=make) for _ in range(2))
    for first in range(0, length, chunk):
        count = min(chunk, length - first)
        x = torch.randn(rows, count, rule.width, generator=make)
        if stream.logit is None:
            x *= torch.exp(torch.randn(rows, count, 1, generator=make))
            x[:, (first + torch.arange(count)) % BROKEN_EVERY == BROKEN_EVERY - 1, 0] = torch.nan
        else:
            x[..., width : 2 * width] = key
            sign = 1.0 - 2.0 * ((first + torch.arange(count)) % 2)
            x[..., 2 * width : 3 * width] = sign[:, None] * value
            x[..., 3 * width :] = stream.logit
        yield x


def lived(stream: Stream, tokens: int, chunk: int = CHUNK) -> Row:
    """A row of one stream of ``tokens`` of all rows together, before its ``share``."""
    close, rule, ops = stream.close, stream.rule, operations("numba", torch.device("cpu"))
    length = max(1, int(tokens * stream.share) // stream.rows)
    bias = torch.full((rule.bias_width,), 0.0 if stream.logit is not None else DeltaMemConfig().beta_bias_init)
    parameters = {"tokens": length * stream.rows, "rows": stream.rows, "heads": stream.heads, "mode": stream.mode}
    parameters |= {} if stream.logit is None else {"logit": stream.logit}
    name = f"tokens/{stream.name}"
    off = wrong(rule, next(chunks(stream, 256)), bias)
    if not off < 1e-9:
        return refused(name, parameters, f"the float64 rule is {off:.1e} from the reference")
    shape = (stream.rows, stream.heads, rule.rank, rule.rank)
    decoded, scanned, exact = torch.zeros(shape), torch.zeros(shape), np.zeros(shape)
    counter, scan_count = torch.zeros(stream.rows, dtype=torch.int32), torch.zeros(stream.rows, dtype=torch.int64)
    steering, kept = random_steering(rule), {}
    worst, at, held = dict.fromkeys(("decode", "scan", "reads", "apart"), 0.0), {}, []
    reads = torch.zeros(stream.rows, rule.read_width)
    for number, x in enumerate(chunks(stream, length, chunk)):
        packed = torch.cat([torch.ones(*x.shape[:2], LAYOUT.width), x], 2).transpose(0, 1).contiguous()
        for token in packed.unbind(0):
            reads, _ = ops.decode_(
                token, bias, decoded, rule, LAYOUT, steering, skipped=counter, check=False, workspace=kept
            )
        out = ops.scan(x, bias, scanned, rule)
        scanned = out.state
        scan_count += out.skipped
        wide = np.empty((*x.shape[:2], rule.read_width))
        follow(x.numpy(), bias.numpy(), rule.heads, rule.rank, rule.mode == "standard", exact, wide)
        wide = torch.from_numpy(wide)
        at = {
            "decode": distance(decoded, torch.from_numpy(exact)),
            "scan": distance(scanned, torch.from_numpy(exact)),
            "reads": larger(distance(out.reads, wide), read_distance(reads, wide[:, -1], exact)),
            "apart": distance(decoded, scanned),
        }
        worst = {key: larger(worst[key], value) for key, value in at.items()}
        if number % 16 == 0:
            held.append(resident())
    broken = 0 if stream.logit is not None else length // BROKEN_EVERY
    row = counted(
        name,
        parameters,
        decode_error=at["decode"],
        scan_error=at["scan"],
        **{f"worst_{key}": value for key, value in worst.items()},
        norm=float(torch.from_numpy(exact).flatten(1).norm(dim=1).max()),
        skipped=int(counter.sum()),
        grown=grown(held),
    )
    row.error = max(at["decode"], at["scan"])
    problems = [f"{key}: {value:.1e}" for key, value in worst.items() if close is not None and not value <= close]
    if counter.tolist() != [broken] * stream.rows or scan_count.tolist() != counter.tolist():
        problems.append(f"counted {counter.tolist()} and {scan_count.tolist()} skipped tokens, not {broken} a row")
    if grown(held) > GROWTH:
        problems.append(f"the process has grown by {grown(held):,} bytes")
    if not torch.isfinite(decoded).all():
        problems.append("the state is not finite")
    if problems:
        row.status, row.note = "refused", "; ".join(problems)
    return row


def read_distance(ours: torch.Tensor, exact: torch.Tensor, state: np.ndarray) -> float:
    """‖ours − exact‖ / ‖S‖ of one token's reads, both [B, H·r], in float64, of the row in which it is largest.

    Not by the read's own length: a unit q at right angles to all keys reads nearly nothing out of a large S, and then
    what is lost of S, however little, is more than what is read.
    """
    sizes = torch.from_numpy(state).flatten(1).norm(dim=1).clamp(min=1e-300)
    return float(((ours.double() - exact).norm(dim=1) / sizes).max())


def larger(one: float, other: float) -> float:
    """The larger one; NaN if one is."""
    return math.nan if math.isnan(one) or math.isnan(other) else max(one, other)


def random_steering(rule: DeltaRule) -> Steering:
    """Corrections of q and o, small."""
    make = torch.Generator().manual_seed(2)
    q = 0.1 * torch.randn(LAYOUT.q * LAYOUT.dim, rule.read_width, generator=make)
    return Steering(q=q, o=0.1 * torch.randn(16, rule.read_width, generator=make), scale=2.0)


# --- a model


def model_lived(tokens: int, context: int = CONTEXT) -> Row:
    """One text through a patched model, a token at a time, in whole contexts, and by the reference; each context
    begins anew, the memory goes on. The row's error: of the memories, the largest distance between two."""
    sizes = {"vocab_size": 512, "num_hidden_layers": 2}
    make = torch.Generator().manual_seed(3)
    models = {}
    for way in ("decode", "scan", "reference"):
        torch.manual_seed(0)
        model = backbones.build(backbones.configuration("Qwen3-4B", tiny=True, **sizes), torch.float32, "cpu")
        backend = "reference" if way == "reference" else "numba"
        models[way] = loud(patch_model(model, DeltaMemConfig.tsw(), backend=backend)).requires_grad_(False)
    memories = {way: MemoryState.zeros(model) for way, model in models.items()}
    worst, held = 0.0, []
    begin = time.perf_counter()
    for first in range(0, tokens, context):
        ids = torch.randint(512, (1, min(context, tokens - first)), generator=make)
        with torch.no_grad():
            for way in ("scan", "reference"):
                models[way](ids, memory=memories[way], logits_to_keep=1)
            cache = None
            for token in ids.split(1, 1):
                out = models["decode"](token, memory=memories["decode"], past_key_values=cache, use_cache=True)
                cache = out.past_key_values
        worst = larger(worst, apart(memories["decode"], memories["scan"]))
        worst = larger(worst, apart(memories["scan"], memories["reference"]))
        if first // context % 4 == 0:
            held.append(resident())
    parameters = {"tokens": tokens, "context": context, "layers": 2}
    last = larger(apart(memories["decode"], memories["scan"]), apart(memories["scan"], memories["reference"]))
    row = counted(
        "tokens/a patched model",
        parameters,
        worst_apart=worst,
        grown=grown(held),
        seconds=time.perf_counter() - begin,
        skipped=int(memories["decode"].skipped.sum()),
    )
    row.error = last
    problems = [f"memories are {worst:.1e} apart"] * (not worst <= CLOSE)
    problems += [f"the process has grown by {grown(held):,} bytes"] * (grown(held) > GROWTH)
    if problems:
        row.status, row.note = "refused", "; ".join(problems)
    return row


def apart(one: MemoryState, other: MemoryState) -> float:
    """Of two memories, the distance of the layer in which it is largest."""
    return functools.reduce(larger, (distance(one[i], other[i]) for i in other))
