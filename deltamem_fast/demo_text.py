"""The demo's figures as text."""

from __future__ import annotations

from typing import Any

from . import demo


def format_demo(figures: dict[str, Any]) -> str:
    """The figures as text."""
    sizes = figures["sizes"]
    lines = [
        "deltamem demo",
        f"Backbone and adapter are random and untrained (seed {figures['seed']}): this shows mechanics, not recall.",
        "",
        f"backbone  Qwen3, {sizes['layers']} layers, hidden {sizes['hidden']}, "
        f"{sizes['backbone_parameters'] / 1e6:.2f} M parameters, float32, on {figures['device']}",
        f"adapter   rank 8, on q and o, {sizes['adapter_parameters'] / 1e3:.1f} k parameters, "
        f"backend {figures['backend']}",
        f"memory    {sizes['memory_bytes']:,} bytes a conversation, whatever its length",
    ]
    for title, part in (
        ("Turns, all conversations as one batch. Only the memory passes from one to the next.", _turn_lines(figures)),
        (
            "A question in a fresh context: the likeliest next tokens, and what the loaded memory changes",
            _question_lines(figures),
        ),
        ("The memory, layer by layer", _state_lines(figures)),
        (_speed_title(figures), _speed_lines(figures)),
        (
            "Checks",
            [f"{'ok  ' if holds else 'FAIL'}  {demo.CHECKS[name]}" for name, holds in figures["checks"].items()],
        ),
    ):
        lines += ["", title, *(f"  {line}" for line in part)]
    return "\n".join([*lines, "", f"{figures['timings']['seconds']:.1f} s"])


def _turn_lines(figures) -> list[str]:
    rows = [("turn", "user", "tokens", "padding", "|memory|", "says")]
    for turn in figures["turns"]:
        counts = (str(turn["prompt_tokens"]), str(turn["padding"]), f"{turn['memory_norm']:.3f}")
        rows.append((str(turn["turn"]), turn["conversation"], *counts, _shortened(turn["text"])))
    return [
        *_table(rows, "rlrrrl"),
        f"Replies of up to {figures['new_tokens']} tokens were read into the memory too; untrained, they are noise "
        "(--json shows them).",
        f"The memory is saved in {figures['memory_file']}",
    ]


def _question_lines(figures) -> list[str]:
    names = {"loaded": "loaded memory", "empty": "empty memory", "disabled": "memory disabled"}
    lines = []
    for question in figures["questions"]:
        rows = []
        for name, title in names.items():
            best = "  ".join(f"{entry['token']!r} {entry['probability']:.3f}" for entry in question["top"][name])
            against = question["loaded_against"].get(name)
            moved = f"max |Δlogit| {against['max_abs_logit']:.3f}, KL {against['kl']:.4f}" if against else ""
            rows.append((title, best, moved))
        lines += [f"{question['conversation']}? {question['question']}", *(f"  {line}" for line in _table(rows, "lll"))]
    return [*lines, "Δ and KL (nats) are those of the loaded memory against that line."]


def _state_lines(figures) -> list[str]:
    rows = [("layer", "user", "norm", "largest |entry|", "effective rank")]
    for entry in figures["state"]:
        numbers = (f"{entry['norm']:.3f}", f"{entry['largest']:.3f}", f"{entry['effective_rank']:.2f}")
        rows.append((str(entry["layer"]), entry["conversation"], *numbers))
    return _table(rows, "rlrrr")


def _speed_title(figures) -> str:
    return (
        f"Tokens per second, one conversation, {demo.PREFILL_TOKENS} tokens of prefill and "
        f"{demo.DECODE_TOKENS} of decode, "
        f"median of {demo.ROUNDS}"
    )


def _speed_lines(figures) -> list[str]:
    timings = figures["timings"]
    rows = [("", "prefill", "decode")]
    for name, title in (
        ("patched", "patched"),
        ("disabled", "patched, memory disabled"),
        ("unpatched", "not patched"),
    ):
        rows.append((title, f"{timings['prefill'][name]:,.0f}", f"{timings['decode'][name]:,.0f}"))
    return _table(rows, "lrr")


def _shortened(text: str, width: int = 60) -> str:
    return text if len(text) <= width else text[: width - 1].rstrip() + "…"


def _table(rows: list[tuple[str, ...]], sides: str) -> list[str]:
    """Rows in columns, each aligned to the left or right as ``sides`` says ("l" or "r")."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(sides))]
    return [
        "  ".join(
            cell.rjust(width) if side == "r" else cell.ljust(width) for cell, width, side in zip(row, widths, sides)
        ).rstrip()
        for row in rows
    ]
