"""A tiny model on disk with its tokenizer and adapters, and local data, for the tests of lm-evaluation-harness."""

from __future__ import annotations

import json
from pathlib import Path

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from support import loud_adapter, tiny_model
from tokenizers_for_tests import chatml_tokenizer

from deltamem_fast import DeltaMemConfig, patch_model, save_adapter, unpatch_model

ADAPTERS = {
    "tsw": DeltaMemConfig.tsw(output_init="random"),
    "ssw": DeltaMemConfig.ssw(output_init="random"),
    "sentence": DeltaMemConfig.ssw("sentence_mean", output_init="random"),
    "msw": DeltaMemConfig.msw(2, output_init="random"),
}
PROMPTS = (
    "Where did Ada go?",
    "My dog is called Rex. My sister lives in Paris.\n\nWhat is the name of my dog?",
    "She went to the market; then she took the train home. Where did she go?",
    "a",
    "The user asks a question and the assistant answers it. What does the user do?",
)


def made(directory: Path) -> Path:
    """A model, and in directories beside it ``ADAPTERS`` of it."""
    tokenizer = chatml_tokenizer()
    model = tiny_model(vocab_size=512, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    for name, config in ADAPTERS.items():
        patch_model(model, config, backend="reference")
        loud_adapter(model, seed=len(name))
        save_adapter(model, directory / name)
        unpatch_model(model)
    return directory


def lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def asks(prompts, **settings) -> list[Instance]:
    """Requests to generate."""
    options = {"until": [], "max_gen_toks": 8, "do_sample": False} | settings
    return [Instance("generate_until", {}, (prompt, options), 0, ("t", i, 1)) for i, prompt in enumerate(prompts)]


def pairs(given) -> list[Instance]:
    """Requests to score."""
    return [Instance("loglikelihood", {}, pair, 0, ("t", i, 1)) for i, pair in enumerate(given)]


def texts(given) -> list[Instance]:
    """Requests to score whole texts."""
    return [Instance("loglikelihood_rolling", {}, (text,), 0, ("t", i, 1)) for i, text in enumerate(given)]


class Saying(LM):
    """Answers each prompt by a function, and keeps what it was asked."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.asked = answer, []

    def generate_until(self, requests, disable_tqdm=False):
        self.asked += [request.args for request in requests]
        return [self.answer(request.args[0]) for request in requests]

    def loglikelihood(self, requests):
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


def evaluated(model, task, *, gen_kwargs: dict | None = None, **options) -> dict:
    """What lm_eval finds of one task; without the second in which ``simple_evaluate`` looks at the machine."""
    if gen_kwargs:
        task.set_config("generation_kwargs", gen_kwargs, update=True)
    task.set_fewshot_seed(1234)
    loaded = TaskManager(include_defaults=False).load([task])
    return lm_eval.evaluate(lm=model, task_dict=loaded, bootstrap_iters=0, **options)
