"""Users' memories in vLLM's offline engine: gather from a bank, generate, commit.

model = memory_model(llm)
with MemoryBank("users.bank", model) as bank:
    memory = bank.gather(["ada", "ben"])
    outputs = generate(llm, prompts, params, memory=memory)
    bank.commit(["ada", "ben"], memory)
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig

from ..adapter.identity import Identity
from ..adapter.layer import DeltaMemory
from ..adapter.record import PatchRecord
from ..adapter.wrappers import RECORD
from ..arguments import check_choice, check_type
from ..errors import ArgumentError, StateError
from ..memory.state import MemoryState
from ..memory.trusting import check_trust, hold_back, holds_back
from .given import MODES, arguments_of, salt_of
from .settings import adapter_of, fill, layers_of

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput, SamplingParams
    from vllm.config import VllmConfig


def memory_model(llm: LLM) -> nn.Module:
    """What ``MemoryState`` and ``MemoryBank`` take in the place of the patched model that runs inside an engine.

    It has the adapter's weights, on the CPU, and no backbone: a bank of a model that was patched with the same adapter
    in transformers, in the same dtype, is a bank of this one.
    """
    return stand_in(llm.llm_engine.vllm_config)


def stand_in(vllm_config: VllmConfig) -> nn.Module:
    """``memory_model`` of an engine's configuration."""
    model_config = vllm_config.model_config
    source = adapter_of(vllm_config)
    backbone = AutoConfig.from_pretrained(
        model_config.model, revision=model_config.revision, trust_remote_code=model_config.trust_remote_code
    )
    text = model_config.hf_text_config
    size = model_config.get_head_size()
    keys = text.num_key_value_heads * size
    sizes = {"q": text.num_attention_heads * size, "k": keys, "v": keys, "o": text.hidden_size}
    memories = {
        f"layers.{layer}.{source.config.target_modules[0]}": DeltaMemory(
            source.config, text.hidden_size, sizes, layer, device="meta", dtype=model_config.dtype
        )
        for layer in layers_of(source.config, text)
    }
    fill(memories, source)
    found = {memory.layer_idx: memory for memory in memories.values()}
    model = nn.Module()
    setattr(model, RECORD, PatchRecord(Identity(found, source.config, backbone, source.name), model, {}))
    return model


def generate(
    llm: LLM,
    prompts: Sequence[str | list[int] | Mapping[str, Any]],
    sampling_params: SamplingParams | Sequence[SamplingParams],
    *,
    memory: MemoryState | None = None,
    mode: str | None = None,
    trust: float = 1.0,
    budget: float | None = None,
    **kwargs,
) -> list[RequestOutput]:
    """``llm.generate``, prompt n with row n of a memory.

    Args:
        llm: an engine with a delta-mem adapter.
        prompts: each a text, a list of token ids, or a mapping as vLLM takes it.
        sampling_params: one for all, or one each; with n = 1 and no stop strings.
        memory: of as many rows. It is read, and written in place once all requests are over: wholly, or, where
            anything raises, not at all. The last token of an answer is not written until it is fed.
        mode: ``write``; ``read``, which leaves the memory as it was; ``none``, the bare model, without a memory. None
            is ``read`` if the memory is frozen, ``write`` otherwise.
        trust, budget: each row goes this share of the way to what its request has made of it, and at most so far, as
            in ``ingest``; whether its tokens were guarded, ``hf_overrides`` say (``delta_mem_guard``).
        **kwargs: for ``llm.generate``.

    Raises:
        ValueError: the memory has another number of rows or does not belong to this adapter, or what was said of
            ``sampling_params`` does not hold.
        StateError: an engine did not write what it returned, or has lost a state.
    """
    check_trust(trust, budget)
    requests, params, keys = prepare(prompts, sampling_params, memory=memory, mode=mode)
    if holds_back(trust, budget) and not keys:
        raise ArgumentError("trust, budget: got one where nothing is written, allowed with a memory and mode 'write'")
    outputs = llm.generate(requests, params, **kwargs)
    if keys:
        before = memory.clone() if holds_back(trust, budget) else None
        with memory.all_or_nothing():
            put_back(memory, llm.collective_rpc("delta_mem_take", args=(keys,))[0], outputs)
            if before is not None:
                hold_back(memory, before, trust, budget)
    return outputs


def prepare(prompts, sampling_params, *, memory: MemoryState | None = None, mode: str | None = None):
    """Prompts with their cache's salts, sampling parameters with their memories, and the keys of what is to be taken.

    Arguments and errors as of ``generate``. For an engine of another kind: give it the prompts and parameters, ask its
    workers for ``delta_mem_take`` of the keys, if there are any, and hand what the first returns to ``put_back``.
    """
    prompts = list(prompts)
    params = list(sampling_params) if isinstance(sampling_params, Sequence) else [sampling_params] * len(prompts)
    if mode is None:
        mode = "read" if memory is not None and memory.frozen else "write"
    check_choice(mode, "mode", MODES)
    rows = _rows(memory, mode, len(prompts))
    if len(params) != len(prompts):
        raise ArgumentError(f"sampling_params: got {len(params)} for {len(prompts)} prompts, allowed one or as many")
    takes = memory is not None and mode == "write"
    if takes:
        memory.check_writable()
        for each in params:
            _check_params(each)
    requests, arguments, keys = [], [], []
    for prompt, each, state in zip(prompts, params, rows):
        key = uuid.uuid4().hex if takes else None
        found = arguments_of(state, mode, key)
        request = _request(prompt)
        if (salt := salt_of(found)) is not None:
            request["cache_salt"] = salt
        requests.append(request)
        each = each.clone()
        each.extra_args = (each.extra_args or {}) | found
        arguments.append(each)
        keys += [key] if takes else []
    return requests, arguments, keys


def put_back(memory: MemoryState, taken: Sequence[tuple[int, bytes] | None], outputs: Sequence[RequestOutput]) -> None:
    """Write into a memory what workers have kept of the requests that started from it; all of it or nothing.

    Args:
        taken: of each row what ``delta_mem_take`` returned.
        outputs: of each row, to see that it was written as far as was returned.

    Raises:
        StateError: a state is not there, or its request was written further or less far than what was returned.
    """
    layers = list(memory)
    shape = len(layers), *memory[layers[0]].shape[1:]
    states = []
    for found, output in zip(taken, outputs, strict=True):
        wanted = len(output.prompt_token_ids) + len(output.outputs[0].token_ids) - 1
        if found is None or found[0] != wanted:
            what = "has none" if found is None else f"has written {found[0]} tokens of it"
            raise StateError(
                f"memory: of request {output.request_id}, whose {wanted} tokens were to be written, the engine {what}; "
                "the memory is as it was"
            )
        states.append(torch.from_numpy(np.frombuffer(found[1], "<f4").astype(np.float32)).view(shape))
    stacked = torch.stack(states)
    with memory.all_or_nothing():
        for place, layer in enumerate(layers):
            memory.put(layer, stacked[:, place].to(memory[layer].device), in_place=True)


def _rows(memory: MemoryState | None, mode: str, count: int) -> list[np.ndarray | None]:
    """The state [L, H, r, r] of each row."""
    if memory is None:
        return [None] * count
    check_type(memory, "memory", MemoryState, "a MemoryState or None")
    if mode == "none":
        raise ArgumentError("memory: got one with mode 'none', allowed with 'write' and 'read'")
    if memory.batch_size != count:
        raise ArgumentError(f"memory: got {memory.batch_size} rows for {count} prompts, allowed one each")
    memory.check_whole()
    layers = torch.stack([memory[layer].detach().cpu() for layer in memory], 1)
    return list(layers.numpy())


def _check_params(params: SamplingParams) -> None:
    if params.n != 1:
        raise ArgumentError(f"n: got {params.n}, allowed 1 with a memory that is written: it cannot be that of several")
    if params.stop:
        raise ArgumentError(
            f"stop: got {params.stop!r}, allowed none with a memory that is written (stop_token_ids are): the engine "
            "has gone on by the time that a text is seen to end"
        )


def _request(prompt) -> dict[str, Any]:
    if isinstance(prompt, str):
        return {"prompt": prompt}
    return dict(prompt) if isinstance(prompt, Mapping) else {"prompt_token_ids": list(prompt)}
