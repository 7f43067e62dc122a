"""``deltamem demo``: a memory at work in a small model that is made here and trained on nothing.

It shows mechanics, not recall: two conversations as one batch, their context dropped after every turn; the memory
saved, loaded and carried over; the backbone untouched; the speed. What a memory promises is checked at the end.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from .adapter import same_bits
from .backends import BACKENDS, resolve_backend
from .demo_conversations import Conversation, read_conversations
from .demo_model import HIDDEN, LAYERS, build_backbone, build_tokenizer, patch_with_random_adapter
from .patch import unpatch_model
from .record import memory_disabled
from .state import MemoryState

PREFILL_TOKENS = 256
DECODE_TOKENS = 32
ROUNDS = 5
TOP_TOKENS = 3
MEMORY_NAME = "memory.safetensors"


CHECKS = {
    "memory_finite": "the memory is finite and no token was left out",
    "saved_equals_loaded": "the loaded memory is the saved one, bit for bit",
    "carried_over_identical": "the loaded memory and the live one give the same logits, bit for bit",
    "memory_changed_logits": "the memory changes the logits of every conversation",
    "disabled_bit_identical": "under memory_disabled the logits are those from before patching, bit for bit",
    "unpatched_bit_identical": "after unpatch_model logits and weights are those from before patching, bit for bit",
}


@torch.no_grad()
def run_demo(
    *,
    seed: int = 0,
    output: str | os.PathLike = "demo-output",
    new_tokens: int = 24,
    backend: str = "auto",
    conversation: str | os.PathLike | None = None,
) -> dict[str, Any]:
    """Run the demo and return its figures, ready for JSON; ``format_demo`` makes text of them.

    Args:
        seed: of backbone and adapter, 0 to 2⁶³ − 1. The same seed gives the same figures, ``timings`` apart.
        output: a directory for ``memory.safetensors``, made if needed.
        new_tokens: of each reply.
        backend: as in ``patch_model``. The model is on a GPU if there is one and the backend runs there.
        conversation: a file, see ``read_conversations``; None = the demo's own.

    Raises:
        ValueError: an argument out of range, a bad line of the file, or a backend that cannot run here.
        FileNotFoundError: no such file.
    """
    started = time.perf_counter()
    _check_arguments(seed, new_tokens, backend)
    conversations = read_conversations(conversation)
    device = _device_for(backend)
    tokenizer = build_tokenizer()
    model = build_backbone(tokenizer, seed).to(device)
    bare = copy.deepcopy(model)
    questions = _encode(tokenizer, [c.question for c in conversations], device)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    before = _next_logits(model, questions)

    patch_with_random_adapter(model, seed, backend)
    memory = MemoryState.zeros(model, batch_size=len(conversations))
    turns = _talk(model, tokenizer, conversations, memory, new_tokens, device)
    path = memory.save(Path(output) / MEMORY_NAME)
    loaded = MemoryState.load(path, model)

    logits = {
        "loaded": _next_logits(model, questions, memory=loaded.clone()),
        "empty": _next_logits(model, questions, memory=MemoryState.zeros(model, len(conversations))),
    }
    live = _next_logits(model, questions, memory=memory.clone())
    with memory_disabled(model):
        logits["disabled"] = _next_logits(model, questions)
    state = _state_table(loaded, conversations)
    speed = _speed(model, bare, device)
    sizes = _sizes(model, bare, memory)
    unpatch_model(model)
    after = _next_logits(model, questions)

    checks = {
        "memory_finite": all(bool(s.isfinite().all()) for _, s in memory.items()) and not bool(memory.skipped.any()),
        "saved_equals_loaded": _same_memory(memory, loaded),
        "carried_over_identical": torch.equal(live, logits["loaded"]),
        "memory_changed_logits": all(
            bool(((logits["loaded"] - logits[other]).abs().amax(dim=-1) > 0).all()) for other in ("empty", "disabled")
        ),
        "disabled_bit_identical": torch.equal(before, logits["disabled"]),
        "unpatched_bit_identical": torch.equal(before, after) and _same_weights(weights, model.state_dict()),
    }
    return {
        "seed": seed,
        "new_tokens": new_tokens,
        "device": _device_name(device),
        "backend": resolve_backend(backend, device.type),
        "trained": False,
        "sizes": sizes,
        "turns": turns,
        "memory_file": str(path),
        "questions": [_answer(tokenizer, c, row, logits) for row, c in enumerate(conversations)],
        "state": state,
        "checks": checks,
        "timings": {"seconds": time.perf_counter() - started, **speed},
    }


def failed_checks(figures: dict[str, Any]) -> list[str]:
    """The promises that did not hold, in words."""
    return [CHECKS[name] for name, holds in figures["checks"].items() if not holds]


def _check_arguments(seed: int, new_tokens: int, backend: str) -> None:
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed: got {seed}, allowed 0 to 2**63 - 1")
    if new_tokens < 1:
        raise ValueError(f"new_tokens: got {new_tokens}, allowed 1 or more")
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, allowed {', '.join(BACKENDS)}")


def _device_for(backend: str) -> torch.device:
    gpu = torch.cuda.is_available() and backend in ("auto", "triton")
    device = torch.device("cuda" if gpu else "cpu")
    resolve_backend(backend, device.type)  # raises before anything is built
    return device


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"cpu, {threads} thread{'s' * (threads != 1)}"


def _encode(tokenizer, texts: list[str], device: torch.device) -> dict[str, torch.Tensor]:
    """One user turn a row, with the header of the reply; shorter rows are padded on the left."""
    chats = [[{"role": "user", "content": text}] for text in texts]
    encoded = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
    )
    return {key: encoded[key].to(device) for key in ("input_ids", "attention_mask")}


def _next_logits(model: nn.Module, inputs: dict[str, torch.Tensor], **arguments) -> torch.Tensor:
    """float32 [B, vocabulary] after the last token."""
    return model(**inputs, logits_to_keep=1, **arguments).logits[:, -1].float()


def _talk(model, tokenizer, conversations, memory, new_tokens, device) -> list[dict[str, Any]]:
    """Run the turns as one batch. Every turn starts without context; ``memory`` alone goes on."""
    rows = []
    for turn in range(len(conversations[0].turns)):
        prompt = _encode(tokenizer, [c.turns[turn] for c in conversations], device)
        output = model.generate(**prompt, memory=memory, max_new_tokens=new_tokens, do_sample=False)
        replies = output[:, prompt["input_ids"].shape[1] :].tolist()
        for row, conversation in enumerate(conversations):
            tokens = int(prompt["attention_mask"][row].sum())
            rows.append({
                "turn": turn + 1,
                "conversation": conversation.name,
                "text": conversation.turns[turn],
                "prompt_tokens": tokens,
                "padding": prompt["input_ids"].shape[1] - tokens,
                "reply": "".join(_token_text(tokenizer, token) for token in _until_end(tokenizer, replies[row])),
                "memory_norm": _norm(memory, row),
            })  # fmt: skip
    return rows


def _until_end(tokenizer, tokens: list[int]) -> list[int]:
    ends = [place for place, token in enumerate(tokens) if token == tokenizer.eos_token_id]
    return tokens[: ends[0]] if ends else tokens


def _token_text(tokenizer, token: int) -> str:
    """A printable character as itself, another byte as <0x..>, a special token by its name."""
    if token >= 256:
        return tokenizer.convert_ids_to_tokens(token)
    return chr(token) if 32 <= token < 127 else f"<0x{token:02X}>"


def _norm(memory: MemoryState, row: int) -> float:
    return math.sqrt(sum(float(state[row].double().square().sum()) for _, state in memory.items()))


def _same_memory(a: MemoryState, b: MemoryState) -> bool:
    return list(a) == list(b) and all(same_bits(a[i], b[i]) for i in a) and torch.equal(a.skipped, b.skipped)


def _same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return list(a) == list(b) and all(same_bits(a[key], b[key]) for key in a)


def _sizes(model: nn.Module, bare: nn.Module, memory: MemoryState) -> dict[str, Any]:
    adapter = [p for name, p in model.named_parameters() if ".delta_memory." in name and p.requires_grad]
    return {
        "layers": LAYERS,
        "hidden": HIDDEN,
        "backbone_parameters": sum(p.numel() for p in bare.parameters()),
        "adapter_parameters": sum(p.numel() for p in adapter),
        "memory_bytes": sum(state[0].nbytes for _, state in memory.items()),
    }


# --- figures


def _answer(tokenizer, conversation: Conversation, row: int, logits: dict[str, torch.Tensor]) -> dict[str, Any]:
    """For one question: the likeliest next tokens under each memory, and how far the loaded one moved the logits."""
    mine = {name: values[row].double().cpu() for name, values in logits.items()}
    return {
        "conversation": conversation.name,
        "question": conversation.question,
        "top": {name: _top(tokenizer, values) for name, values in mine.items()},
        "loaded_against": {name: _difference(mine["loaded"], mine[name]) for name in ("empty", "disabled")},
    }


def _top(tokenizer, logits: torch.Tensor) -> list[dict[str, Any]]:
    best = logits.softmax(-1).topk(TOP_TOKENS)
    return [
        {"token": _token_text(tokenizer, token), "id": token, "probability": probability}
        for probability, token in zip(best.values.tolist(), best.indices.tolist())
    ]


def _difference(logits: torch.Tensor, other: torch.Tensor) -> dict[str, float]:
    """max |Δlogit|, and KL(softmax(logits) ‖ softmax(other)) in nats."""
    p, q = logits.log_softmax(-1), other.log_softmax(-1)
    return {"max_abs_logit": float((logits - other).abs().max()), "kl": float((p.exp() * (p - q)).sum())}


def effective_rank(state: torch.Tensor) -> float:
    """exp of the entropy of the normalised singular values of [..., r, r], the mean over what leads; 0 if all are 0."""
    values = torch.linalg.svdvals(state.double())
    shares = values / values.sum(-1, keepdim=True).clamp(min=1e-300)
    ranks = torch.special.entr(shares).sum(-1).exp() * (values.sum(-1) > 0)
    return float(ranks.mean())


def _state_table(memory: MemoryState, conversations: list[Conversation]) -> list[dict[str, Any]]:
    return [
        {
            "layer": layer,
            "conversation": conversation.name,
            "norm": float(state[row].double().norm()),
            "largest": float(state[row].abs().max()),
            "effective_rank": effective_rank(state[row]),
        }
        for layer, state in memory.items()
        for row, conversation in enumerate(conversations)
    ]


# --- speed


def _speed(model: nn.Module, bare: nn.Module, device: torch.device) -> dict[str, dict[str, float]]:
    """Tokens per second of one conversation, the median over rounds, prefill and decode.

    The three variants take turns within a round, so that a machine that slows down slows all of them.
    """
    variants = {
        "patched": (model, contextlib.nullcontext),
        "disabled": (model, lambda: memory_disabled(model)),
        "unpatched": (bare, contextlib.nullcontext),
    }
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(256, (1, PREFILL_TOKENS), generator=generator).to(device)
    taken = {name: ([], []) for name in variants}
    for turn in range(ROUNDS + 1):
        for name, (which, context) in variants.items():
            with context():
                seconds = _time_once(which, prompt, device)
            if turn:  # the first round warms up
                for times, value in zip(taken[name], seconds):
                    times.append(value)
    return {
        phase: {name: tokens / statistics.median(taken[name][i]) for name in variants}
        for i, (phase, tokens) in enumerate((("prefill", PREFILL_TOKENS), ("decode", DECODE_TOKENS)))
    }


def _time_once(model: nn.Module, prompt: torch.Tensor, device: torch.device) -> tuple[float, float]:
    """Seconds for the prompt, and for the tokens after it, one by one."""
    cache = DynamicCache(config=model.config)
    start = _now(device)
    token = model(prompt, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
    middle = _now(device)
    for _ in range(DECODE_TOKENS):
        token = model(token, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
    return middle - start, _now(device) - middle


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
