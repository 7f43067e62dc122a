"""``deltamem serve --engine vllm``: the same routes, answered by vLLM."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import threading
from collections.abc import Iterator
from typing import Any

from deltamem_kernels.rule import DeltaRule

from ..adapter.files import read_adapter
from ..adapter.guard import guarding
from ..errors import ArgumentError
from ..memory.bank import MemoryBank
from ..memory.trusting import holds_back
from ..model.known import is_known, known_directory
from ..model.loading import found_model
from ..notices import logger
from ..serving.jobs import Limits
from ..serving.metrics import Metrics
from ..serving.run import bank_path, chosen, limits_of, listen, run
from ..text.answering import as_ids
from .engine import VllmEngine
from .settings import GUARD, KEY

# What vLLM has a model of its own for; others run on its Transformers backend.
_NATIVE = {"qwen3": "DeltaMemQwen3ForCausalLM", "llama": "DeltaMemLlamaForCausalLM"}
_OTHERS = "DeltaMemForCausalLM"
_DECIDED = ("model", "hf_overrides", "max_num_seqs")


def serve(arguments: argparse.Namespace, key: str | None, threads: int | None) -> int:
    """Serve until a signal ends it; arguments and errors as of ``serving.run.serve``."""
    given = engine_arguments(arguments.engine_args)
    name, loading = chosen(arguments)
    limits = limits_of(arguments)
    with listen(arguments.host, arguments.port) as listening:
        directory = found_model(loading["name"])
        if is_known(directory):
            directory = known_directory(directory)
        adapter = read_adapter(loading["adapter"])
        settings = {
            "model": directory,
            "hf_overrides": {"architectures": [_architecture(directory)], KEY: str(adapter.directory)},
            "dtype": arguments.dtype,
            "max_num_seqs": limits.rows,
        } | given
        settings["hf_overrides"][GUARD] = is_guarded(arguments.guard, limits, adapter.config.rule)
        with running(settings) as (llm, loop):
            _serve(llm, loop, directory, name, limits, bank_path(arguments.bank, name), key, listening)
    return 0


def is_guarded(guard: str, limits: Limits, rule: DeltaRule) -> bool:
    """Whether an engine guards all that is written: as it is told, or (``auto``) where all turns are held back.

    Raises:
        ValueError: it is told to, and the adapter cannot be guarded.
    """
    if guard == "on":
        return guarding(True, rule).always
    if guard == "off" or not holds_back(limits.trust, limits.budget):
        return False
    if not rule.normalize:
        logger.warning("turns are held back, and nothing bounds what they write: the adapter's keys are raw")
    return rule.normalize


def _serve(llm, loop, directory: str, name: str, limits, path, key: str | None, listening) -> None:
    from transformers import AutoTokenizer

    from .offline import stand_in

    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    model = stand_in(llm.vllm_config)
    with MemoryBank(path, model) as bank:
        engine = VllmEngine(
            llm, loop, tokenizer, ends_of(directory, tokenizer), bank, model, name, limits, Metrics()
        )  # fmt: skip
        try:
            run(engine, key, listening, path)
        finally:
            engine.close()


@contextlib.contextmanager
def running(settings: dict[str, Any]) -> Iterator[tuple[Any, asyncio.AbstractEventLoop]]:
    """vLLM's asynchronous engine, and the loop that it runs in, of a thread of its own.

    Args:
        settings: of ``AsyncEngineArgs``.
    """
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="deltamem-vllm", daemon=True)
    thread.start()
    try:
        llm = asyncio.run_coroutine_threadsafe(_started(settings), loop).result()
        try:
            yield llm, loop
        finally:
            asyncio.run_coroutine_threadsafe(_ended(llm), loop).result()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _started(settings: dict[str, Any]):
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    return AsyncLLM.from_engine_args(AsyncEngineArgs(**settings))


async def _ended(llm) -> None:
    llm.shutdown()
    # It leaves its tasks behind, which a loop must not stop under.
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


def engine_arguments(text: str | None) -> dict[str, Any]:
    """The arguments of vLLM's engine in a JSON object.

    Raises:
        ValueError: no JSON object, or with an argument that is decided here.
    """
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise ArgumentError(f"--engine-args: got {text!r:.80}, allowed a JSON object ({error})") from error
    if not isinstance(found, dict):
        raise ArgumentError(f"--engine-args: got {text!r:.80}, allowed a JSON object")
    for name in _DECIDED:
        if name in found:
            raise ArgumentError(f"--engine-args: got {name}, which MODEL, --adapter and --max-batch decide")
    return found


def ends_of(directory: str, tokenizer) -> list[int]:
    """Ids of the tokens that end an answer: the model's, and the tokenizer's."""
    from transformers import GenerationConfig

    try:
        ends = GenerationConfig.from_pretrained(directory).eos_token_id
    except OSError:  # there is none
        ends = None
    return list(dict.fromkeys(as_ids(ends) + as_ids(tokenizer.eos_token_id)))


def _architecture(directory: str) -> str:
    from transformers import AutoConfig

    return _NATIVE.get(AutoConfig.from_pretrained(directory, trust_remote_code=False).model_type, _OTHERS)
