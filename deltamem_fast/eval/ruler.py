"""Rows of RULER, made by lm_eval's functions with a tokenizer that is there."""

from __future__ import annotations

from typing import Any

from ..errors import ArgumentError

_MARGIN = 40


def needles(tokenizer, length: int, samples: int) -> list[dict[str, Any]]:
    """Rows of ``niah_single_1``, of ``length`` tokens each, the answer's among them.

    Raises:
        ValueError: ``length`` is too little for one.
    """
    from lm_eval.tasks.ruler import niah_utils

    kind = {"type_haystack": "repeat", "type_needle_k": "words", "type_needle_v": "numbers"}  # those of niah_single_1
    try:
        return niah_utils.generate_samples(
            niah_utils.get_haystack(type_haystack="repeat"), tokenizer, max_seq_length=length,
            template=niah_utils.TEMPLATE, num_samples=samples, **kind,
        )  # fmt: skip
    except ValueError as error:
        raise ArgumentError(f"lengths: got {length}, too little for a row of ruler-niah: {error}") from error


def variables(tokenizer, length: int, samples: int) -> list[dict[str, Any]]:
    """Rows of ``ruler_vt``, of at most ``length`` tokens each, the answer's among them.

    Raises:
        ValueError: ``length``, or the 500 tokens of the worked example, are too little for one.
    """
    from lm_eval.tasks.ruler import vt_utils

    def check(noises: int, most: int, *, is_icl: bool) -> None:
        # lm_eval goes on trying without an end where not even the least number of sentences fits, with 30 for the
        # answer; names and numbers are drawn anew for each row, so that some are a little longer.
        text, _ = vt_utils.generate_input_output(noises, 1, 4, is_icl=is_icl)
        needed = len(tokenizer(text).input_ids) + 30 + _MARGIN
        if needed > most:
            raise ArgumentError(f"tokenizer: the shortest row of ruler-vt has {needed} tokens, allowed {most}")

    make = vt_utils.sys_vartrack_w_noise_random
    check(5, 500, is_icl=True)
    example = make(tokenizer=tokenizer, num_samples=1, max_seq_length=500, incremental=5)[0]
    behind = example["input"] + " " + " ".join(example["outputs"]) + "\n\n"
    check(10, length - len(tokenizer(behind).input_ids), is_icl=False)
    return make(tokenizer=tokenizer, num_samples=samples, max_seq_length=length, icl_example=example)


MAKERS = {"ruler-niah": needles, "ruler-vt": variables}
