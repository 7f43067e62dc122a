"""The pages of docs/results and README's few rows, each made whole from the newest results.

What was never measured is said once on a page, never in a row of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from .. import executed
from ..instrument import results
from ..instrument.results import Result
from ..instrument.rows import Row
from ..instrument.tables import markdown, markdown_table, number, parameters, ratio, timing
from ..instrument.targets import TARGETS, Target
from . import plots
from . import trust as trusted
from .evaluation import sections
from .found import Found, newest_rows
from .life import life_sections
from .parts import NOT_YET, cross, curve, page, pictures, section, sections_of
from .recall_pages import SENTENCES, in_order, recall, released, smollm2

SPEED = {
    "prefill": "A prompt",
    "decode": "Decoding",
    "training-step": "A training step",
    "scan": "One scan of T tokens",
    "scan-gradient": "Forward and backward of a scan",
}
KERNELS = {
    "operations": "Tensor operations and launches per decoded token and layer",
    "compiled": "All kernels, compiled ahead of time",
    "scan-depth": "Dependent token steps of a scan",
    "copy": "A copy within the device's memory",
    "kernel": "Kernels",
    "counters": "Nsight Compute's counts of one launch",
    "compiled-reference": "The plain PyTorch definition under torch.compile",
    "tests": "Tests on the GPU",
}
FUZZ = (
    "`make fuzz`: every reader of what comes from outside is given inputs that reach code which none before has "
    "reached. A crash is anything but a value or a typed error; each was mended, and is a test. `make test` gives "
    "15,000 more."
)


# --- speed and kernels


def _number(target: Target, row: Row) -> str:
    if target.baseline:
        return ratio(row.ratios[target.baseline])
    return number(row.values[target.value]) if row.values[target.value] % 1 else f"{row.values[target.value]:,.0f}"


def target_tables(targets: Iterable[Target], rows: Sequence[Row]) -> tuple[str, str]:
    """The targets of which ``rows`` have a number, and the others; "" for none."""
    measured = [["what", "target", "stretch", "measured (p20 to p80)", "met"]]
    others = [measured[0][:3]]
    for target in targets:
        row, goals = target.worst(rows), [target.what, target.bound(target.goal), target.bound(target.stretch)]
        if row is None:
            others.append(goals)
            continue
        met = ("yes" if target.met(target.number(row)) else "no") + " (the spread includes it)" * target.open(row)
        measured.append([*goals, _number(target, row), met])
    return tuple(markdown(lines) if len(lines) > 1 else "" for lines in (measured, others))


def _shown(row: Row) -> bool:
    """Whether a row is on a page: of a sweep over ranks, heads and rows only r = 8, H = 1, one row."""
    if row.status == "absent" or row.kind != "kernel":
        return row.status != "absent"
    sizes = row.parameters
    return (sizes.get("rank"), sizes.get("heads")) == (8, 1) and (sizes.get("batch") == 1 or sizes.get("tokens") == 1)


def row_tables(rows: Sequence[Row], titles: Mapping[str, str]) -> Iterator[str]:
    """A heading and a table for each kind of row in ``titles``; what was left out last, in a line."""
    for kind, title in titles.items():
        kept = [row for row in rows if row.kind == kind and _shown(row)]
        yield from [f"### {title}", markdown_table(kept)] * bool(kept)
    # Parts of a run that there was no time for have names of their own: they are on the page of speed.
    here = titles.keys() if titles is KERNELS else {row.kind for row in rows} - KERNELS.keys()
    absent = [row for row in rows if row.status == "absent" and row.kind in here]
    said = [f"{row.name} {parameters(row)}".strip() + f" ({row.note})" for row in absent]
    yield f"Left out: {'; '.join(said)}." if said else ""


def _machines(found: Found, titles: Mapping[str, str]) -> Iterator[str]:
    """A section for each machine, and the targets without a number on any of them."""
    targets = [target for target in TARGETS if target.name.split("/")[0] in titles]
    for result in found.machines:
        yield from (f"## {result.head['device']}", results.heading(result), target_tables(targets, result.rows)[0])
        yield pictures(
            plots.picture(name, result, found.pictures)
            for name in plots.MACHINE
            if (name == "kernels") is (titles is KERNELS)
        )
        yield from row_tables(result.rows, titles)
    _, others = target_tables(targets, [row for result in found.machines for row in result.rows])
    yield f"## {NOT_YET.capitalize()}\n\n{others}" if others else ""


def speed(found: Found) -> str:
    """What the memory costs in time, machine by machine."""
    return page(
        "Speed",
        "`make bench` measures on this machine, `make gpu` on a GPU in nine minutes; `bench/compare OLD NEW` says what "
        "moved. A ratio says how many times as fast as the variant it names: median, p20 to p80 over the turns. "
        "*unpatched* is the bare model, *released* the code that came with the paper.",
        *_machines(found, SPEED),
    )


def kernels(found: Found) -> str:
    """What needs no clock, and what a GPU says of each kernel."""
    text = (
        "Instructions of warps and 32-byte sectors of a call and of its launches, as compiled for sm_90 "
        "(`make kernels-report`); *bytes ÷ floor*: what goes past L1 ÷ what a call must move."
    )
    emulated = section("On the PTX emulator", text, found.emulated, executed.table)
    intro = "Counts need no clock; times of single kernels come from `make gpu`."
    return page("Kernels", intro, *emulated, *_machines(found, KERNELS))


# --- memory


def operator_table(rows: Sequence[Row]) -> str:
    """A line for each operator, a column for each strategy."""

    def cell(row: Row) -> tuple[str, str, str]:
        strength, values = row.parameters["number"], (row.values[name] for name in ("first", "revised", "others"))
        title = row.parameters["operator"] + ("" if strength is None else f" {strength:g}")
        text = " / ".join(f"{100 * value:.0f}" for value in values)
        return title, f"{row.variant}: it, the new value, the others", text

    return cross("the first of four facts", map(cell, rows))


def memory(found: Found) -> str:
    """What keeping memories costs: the bank, the operators, sessions."""
    bank = "Memories in the shape of a Qwen3-4B's (9,216 bytes) under ids in random order."
    operators = (
        "A memory is told four facts, an operator is applied with the first one's statement, and all are asked for, "
        "each in a context of its own: right answers in percent (the first fact / its new value / the other three). A "
        "number behind `forget` is its strength, behind `decay` its rate."
    )
    sessions = (
        "A turn of a session beside one by hand (`generate` on a cache and a memory that are kept): 64 tokens said, 64 "
        "answered, a 48 M-parameter model on a CPU."
    )
    return page(
        "A memory one can hold",
        "`make holding` measures.",
        *section("Bank", bank, found.bank, markdown_table),
        *section("Operators", operators, found.operators, operator_table),
        *section("Sessions", sessions, found.sessions, markdown_table),
    )


def serving(found: Found) -> str:
    """What servers take, and whether a memory is lost or crossed."""
    load = (
        "Clients that ask without a pause, each with a memory of its own, the newest turn sent along, answers of 16 "
        "tokens at most, float32. `distance`: of a memory to that of a replay of its turns, each by itself and beside "
        "nobody, relative, the largest."
    )
    kills = (
        "Users whose turns interleave on the small backbone, while the server is killed (SIGKILL) and started again: "
        "`repeated` turns were cut off and had again, `unacknowledged` ones were kept though their answer never came. "
        "Each memory is at the version of the last turn, and is that of its replay."
    )
    vllm = (
        "A batch answered by a bare engine and by one with an adapter, in turns (`python -m bench.speed.vllm`). "
        "`cache/memory`: bytes of a block of the cache, and what share of that the states are."
    )
    return page(
        "Serving",
        "`make serving` and `make serving-vllm` measure.",
        *sections_of("Many clients", load, found.load),
        *sections_of("Kills", kills, found.kills),
        *section("vLLM, with a memory and without", vllm, found.vllm, markdown_table),
    )


# --- what leads there


PAGES = {"speed.md": speed, "kernels.md": kernels, "memory.md": memory, "recall.md": recall}


def evaluation(found: Found) -> str:
    """Benchmarks of long texts: what the memory, retrieval, and both together give and cost."""
    intro = (
        "Each row is what stays in context, with a memory or without; [what rows and columns are](../evaluation.md). "
        "The paper's own models are not among them: their weights and a GPU are needed."
    )
    return page("Does it help?", intro, *sections(found.evaluations, "../../bench/results/eval"))


def trust(found: Found) -> str:
    """What hostile text does to a memory, what trust saves and costs, and what readers were given."""
    parts = section("Hostile text", trusted.NOTE, found.trust, lambda rows: "\n\n".join(trusted.tables(rows)))
    if found.trust and found.trust_before:
        parts += ["## Before the adapters were made to last", trusted.BEFORE, results.heading(found.trust_before)]
        parts.append(trusted.before_and_after(found.trust_before.rows, found.trust.rows))
    parts += section("What a guard takes", trusted.GUARD, found.guard, markdown_table)
    parts += ["## Hostile bytes", FUZZ, trusted.fuzz_table(found.fuzz) if found.fuzz else f"{NOT_YET.capitalize()}."]
    return page("Trust", "What these are about, and what bounds a memory: [trust.md](../trust.md).", *parts)


def long_life(found: Found) -> str:
    """Does anything drift, grow or get lost in the long run?"""
    sections = life_sections(found) or [f"{NOT_YET.capitalize()}."]
    return page("A long life", "`python -m bench.life tokens|session|bank` measures.", *sections)


PAGES |= {"smollm2.md": smollm2, "released.md": released, "serving.md": serving, "evaluation.md": evaluation}
PAGES |= {"trust.md": trust, "life.md": long_life}


def written(found: Found) -> dict[str, str]:
    """Every page by file name."""
    pages = {name: make(found) for name, make in PAGES.items()}
    links = [f"- [{text.split(chr(10))[0][2:]}]({name}): {PAGES[name].__doc__[:-1]}" for name, text in pages.items()]
    return {"README.md": page("Results", "\n".join(links), readme_rows(found)), **pages}


def _device(result: Result) -> str:
    head = result.head
    name = re.sub(r"\((R|TM)\)| Processor$", "", head["device"])
    return name if head["driver"] else f"{name}, {head['threads']} threads"


def _sentence_rows(found: Found) -> Iterator[list[str]]:
    """SmolLM2's recall of four facts, by strategy, beside what it answers with all in sight and with nothing."""
    rows = in_order(newest_rows(found.smollm2))
    at = {"facts": 4, "new": "new values"}
    shares = {variant: row.values["share"] for variant, row in curve(rows, "facts") if row.parameters == at}
    if "context" in shares and "bare" in shares:
        told = ", ".join(f"{SENTENCES[name]} {plots.percent(shares[name])}" for name in SENTENCES if name in shares)
        said = f"{told}; all in sight {plots.percent(shares['context'])}, nothing {plots.percent(shares['bare'])}"
        yield ["The same in sentences, answers as free text", said, "SmolLM2-135M-Instruct"]


def _released_rows(found: Found) -> Iterator[list[str]]:
    """Three ways of telling under SDPA, one adapter in both implementations."""
    rows = [row for row in (found.released.rows if found.released else ()) if row.status == "measured"]
    for told in ("one forward", "two chunks", "batches of 8, padded"):
        at = {"attention": "sdpa", "told": told}
        shares = {row.variant: plots.percent(row.values["share"]) for row in rows if row.parameters == at}
        if len(shares) > 1:
            said = ", ".join(f"{name} {share}" for name, share in shares.items())
            yield [f"One adapter in both, SDPA, told in {told}: answered right", said, "that small model"]


def readme_rows(found: Found) -> str:
    """A few rows: what the memory costs and what it gives."""
    lines = [["", "measured (p20 to p80)", "on"]]
    every = [(row, _device(result)) for result in found.machines for row in result.rows]
    for what, name, baseline, size in (
        ("Decoding with the memory, times as fast as the bare model", "decode/patched", "unpatched", "batch"),
        ("A prompt with the memory, times as fast as the bare model", "prefill/patched", "unpatched", "tokens"),
        ("Decoding, times as fast as the released code", "decode/patched", "released", "batch"),
    ):
        kept = [(row, on) for row, on in every if row.name == name and baseline in row.ratios]
        kept = [(row, on) for row, on in kept if row.parameters["batch"] == 1 and on == kept[0][1]]  # GPUs are first
        sizes = {row.parameters[size]: (row, on) for row, on in reversed(kept)}
        said = [
            f"{value:,} tokens: " * (size == "tokens") + ratio(row.ratios[baseline]) + f" ({row.note})" * bool(row.note)
            for value, (row, _) in sorted(sizes.items())
        ]
        for row, on in kept[:1]:
            lines.append([what, "; ".join(said), f"a random {row.parameters['model']}, {on}"])
    shares = {
        variant: row.values["share"]
        for variant, row in (curve(found.recall.rows, "facts") if found.recall else ()) if row.parameters["facts"] == 4
    }  # fmt: skip
    told = [f"{title} {plots.percent(shares[name])}" for name, (title, _) in plots.STRATEGIES.items() if name in shares]
    if told and "frozen" in shares:
        size = f"the shipped {found.recall.head['parameters'] / 1e6:.1f} M-parameter model"
        said = f"{', '.join(told)}; without a memory {plots.percent(shares['frozen'])}"
        lines.append(["Four facts told, their context gone: answered right", said, size])
    lines += [*_sentence_rows(found), *_released_rows(found)]
    for row in [row for row in (found.bank.rows if found.bank else ()) if row.name == "bank/gather"][:1]:
        what = f"{row.parameters['ids']} memories out of {row.parameters['users']:,}, gathered from a bank"
        lines.append([what, timing(row), f"those of a Qwen3-4B, {_device(found.bank)}"])
    streaming = next(target for target in TARGETS if target.value == "streaming")
    worst = streaming.worst([row for row, _ in every])
    on = next((on for row, on in every if row is worst), "")
    said = NOT_YET if worst is None else plots.percent(worst.values["streaming"])
    lines.append(["Kernels that move memory, share of the copy bandwidth: the slowest", said, on])
    return markdown(lines)
