"""One row of a benchmark that lm-evaluation-harness has itself: run by it, kept and scored as rows of ours are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from ..model.libraries import told
from .answering import Settings
from .answers import Answer, AnswerFile
from .harness import DeltaMemLM
from .paper import check_packages, local_task, paper_task_named
from .policies import Policy


def harness_row(
    model: nn.Module,
    tokenizer,
    name: str,
    path: Path | None,
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
        path: a local file with the benchmark's rows; None = lm_eval fetches them from the hub.
        pretrained: where the model was had from; RULER loads its tokenizer from there.
        settings: of which lm_eval's own tasks have ``batch``, ``new_tokens`` and ``template``.
        limit: how many questions, the first of the data; None = all.

    Raises:
        ValueError, OSError, ImportError: of the data, or lm_eval; the message names the benchmark.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    paper = paper_task_named(name)
    check_packages(name)
    lm = DeltaMemLM(
        model, tokenizer=tokenizer, policy=policy.name, batch_size=settings.batch,
        **({"chat_template_args": settings.template} if settings.template else {}),
    )  # fmt: skip
    task = paper.task if path is None else local_task(name, path, seed=seed)
    # To look through all that lm_eval knows takes seconds.
    manager = TaskManager(include_defaults=path is None)
    options = {"gen_kwargs": f"max_gen_toks={settings.new_tokens}"} if settings.new_tokens else {}
    with told(f"task {name}"), _kept(lm, file, name):
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
            metadata={"tokenizer": pretrained, "pretrained": pretrained},
            **options,
        )
    samples = [sample for sample in found["samples"][paper.task] if sample["filter"] in (paper.filter, None)]
    ids = {sample["doc_id"]: _id(name, sample["doc_id"]) for sample in samples}
    return {
        "scores": {ids[sample["doc_id"]]: float(sample[paper.metric]) for sample in samples},
        "categories": dict.fromkeys(ids.values(), ""),
        "documents": {id: id for id in ids.values()},
        "metric": paper.metric,
        "title": paper.title,
        "notes": [paper.notes] if paper.notes else [],
        "aggregate": {"overall": found["results"][paper.task][f"{paper.metric},{paper.filter}"]},
    }


def _id(name: str, place: int) -> str:
    return f"{name}-{place}"


@contextlib.contextmanager
def _kept(lm: DeltaMemLM, file: AnswerFile, name: str) -> Iterator[None]:
    """Inside, each answer is written to ``file`` as soon as it is there, and those that it has are not run again."""
    run = lm.generate_until
    asked: dict[str, list[str]] = {}

    class Hook:
        def add_partial(self, kind: str, request: tuple, answer: str) -> None:
            waiting = asked.get(request[0]) if kind == "generate_until" else None
            if waiting:
                file.append(Answer(id=waiting.pop(0), answer=answer, **lm.costs.get(request[0], {})))

    def generate_until(requests: list, disable_tqdm: bool = False) -> list[str]:
        ids = [_id(name, request.doc_id) for request in requests]
        left = [(id, request) for id, request in zip(ids, requests) if id not in file.answers]
        for id, request in left:
            asked.setdefault(request.args[0], []).append(id)
        if left:
            run([request for _, request in left], disable_tqdm=disable_tqdm)
        return [file.answers[id].answer for id in ids]

    hook, lm.cache_hook, lm.generate_until = lm.cache_hook, Hook(), generate_until
    try:
        yield
    finally:
        lm.cache_hook = hook
        del lm.generate_until
