"""One row of a benchmark that lm-evaluation-harness has itself: run by it, kept and scored as rows of ours are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import ArgumentError
from ..model.libraries import told
from .answering import Settings
from .answers import Answer, AnswerFile
from .harness import DeltaMemLM
from .paper import metric_of, paper_task_named
from .policies import Policy

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask


def harness_row(
    model: nn.Module,
    tokenizer,
    name: str,
    task: ConfigurableTask,
    policy: Policy,
    file: AnswerFile,
    *,
    pretrained: str,
    settings: Settings,
    seed: int = 0,
    limit: int | None = None,
) -> dict[str, Any]:
    """Run what ``file`` has no answers to, and return what ``scores/TASK/ROW.json`` has in it.

    Args:
        name: one of ``PAPER_TASKS``.
        task: of it, see ``paper.open_task``.
        pretrained: what lm_eval calls the model.
        settings: all of them count; without ``new_tokens`` an answer has as many as the benchmark (``PaperTask``), and
            at most half of what the model can see.
        limit: how many questions, the first of the data; None = all.

    Raises:
        ValueError, OSError, ImportError: of the data, ``settings``, or lm_eval; the message names the benchmark.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    paper = paper_task_named(name)
    lm = DeltaMemLM(
        model, tokenizer=tokenizer, policy=policy.name, batch_size=settings.batch, window=settings.window,
        chunk=settings.chunk, chunk_tokens=settings.chunk_tokens, embedder=settings.embedder,
        **({"chat_template_args": settings.template} if settings.template else {}),
    )  # fmt: skip
    lm.model_name = pretrained
    tokens = _new_tokens(lm, settings.new_tokens, paper.new_tokens)
    manager = TaskManager(include_defaults=False)  # to look through all that lm_eval knows takes seconds
    options = {"gen_kwargs": f"max_gen_toks={tokens}"} if tokens else {}
    with told(f"task {name}"), _kept(lm, file, name) as notes:
        found = lm_eval.simple_evaluate(
            model=lm,
            tasks=[task],
            task_manager=manager,
            num_fewshot=paper.few_shot or None,
            limit=limit,
            apply_chat_template=paper.chat_template and bool(getattr(tokenizer, "chat_template", None)),
            log_samples=True,
            bootstrap_iters=0,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
            **options,
        )
    samples = [sample for sample in found["samples"][paper.task] if sample["filter"] in (paper.filter, None)]
    ids = {sample["doc_id"]: _id(name, sample["doc_id"]) for sample in samples}
    metric = metric_of(name, (sample["doc"] for sample in samples))
    if not settings.new_tokens and tokens < paper.new_tokens:
        notes.append(f"answers had {tokens:,} tokens instead of {paper.new_tokens:,}: the model sees {lm.max_length:,}")
    return {
        "scores": {ids[sample["doc_id"]]: float(sample[metric]) for sample in samples},
        "categories": dict.fromkeys(ids.values(), ""),
        "documents": {id: id for id in ids.values()},
        "metric": metric,
        "title": paper.title,
        "notes": [*([paper.notes] if paper.notes else []), *notes],
        "aggregate": {"overall": found["results"][paper.task][f"{metric},{paper.filter}"]},
    }


def _id(name: str, place: int) -> str:
    return f"{name}-{place}"


def _new_tokens(lm: DeltaMemLM, wanted: int, usual: int) -> int:
    """Tokens of an answer at most; 0 = as lm_eval has it."""
    if lm.policy.kind == "yarn":  # which reaches further
        return wanted or usual
    if wanted >= lm.max_length:
        raise ArgumentError(f"new_tokens: got {wanted}, allowed less than {lm.max_length}, which the model sees")
    return wanted or min(usual, lm.max_length // 2)


@contextlib.contextmanager
def _kept(lm: DeltaMemLM, file: AnswerFile, name: str) -> Iterator[list[str]]:
    """Inside, each answer is written to ``file`` as soon as it is there, and those that it has are not run again.

    What is found depends on all requests, not on those that are left: positions under ``yarn``, and what is yielded,
    notes for the report, which are complete when the requests have been run.
    """
    run, notes = lm.generate_until, []
    asked: dict[str, list[str]] = {}

    class Hook:
        def add_partial(self, kind: str, request: tuple, answer: str) -> None:
            waiting = asked.get(request[0]) if kind == "generate_until" else None
            if waiting:
                file.append(Answer(id=waiting.pop(0), answer=answer, **lm.costs.get(request[0], {})))

    def generate_until(requests: list, disable_tqdm: bool = False) -> list[str]:
        ids = [_id(name, request.doc_id) for request in requests]
        lm.least_length = max(map(lm.length_of, requests), default=0) if lm.policy.kind == "yarn" else 0
        cut, fits = lm.cut_off(requests)
        if cut:
            notes.append(
                f"{cut} of {len(requests)} prompts were longer than {fits:,} tokens and cut at their beginning"
            )
        left = [(id, request) for id, request in zip(ids, requests) if id not in file.answers]
        for id, request in left:
            asked.setdefault(request.args[0], []).append(id)
        if left:
            run([request for _, request in left], disable_tqdm=disable_tqdm)
        return [file.answers[id].answer for id in ids]

    hook, lm.cache_hook, lm.generate_until = lm.cache_hook, Hook(), generate_until
    try:
        yield notes
    finally:
        lm.cache_hook, lm.least_length = hook, 0
        del lm.generate_until
