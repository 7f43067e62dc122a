"""The backbone of the recall proof: a small Qwen3 trained from scratch until it recalls what its context states.

Loss is taken on the answers, and with a small weight on all other tokens, so that it is a language model of its world
too. Two phases: terse lists of keys and values until nine answers in ten are right (a sudden change after some hundred
steps), then conversations.

From a random start this model needs thousands of steps to find out that a value stands behind its key. The start here
is structured, after A. Trockman and J. Z. Kolter, Mimetic Initialization of Self-Attention Layers (2023): queries and
keys alike, values and outputs transposed; two heads of the first layer begin by looking one token back. Everything is
trained from there.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import Qwen3Config, Qwen3ForCausalLM

from deltamem_fast.recall import task
from deltamem_fast.recall.tokenizer import build_tokenizer
from deltamem_fast.storage.files import write_json

from . import checkpoint

LAYERS, HIDDEN, HEADS, HEAD_DIM = 4, 128, 4, 32
EMBEDDING_STD = 0.05


@dataclass(frozen=True)
class BackboneOptions:
    """How the backbone is trained.

    Attributes:
        steps: of the second phase; the first ends by itself.
        most_first_steps: an error is raised if the first phase takes more.
        rows, length: of a batch, in tokens; the last quarter takes half as many rows twice as long.
        lr: of AdamW, constant in the first phase, cosine to a twentieth in the second.
        other_weight: of the loss on tokens that are no answers.
        seed: of weights and data.
        save_every: steps between checkpoints.
    """

    steps: int = 1500
    most_first_steps: int = 3000
    rows: int = 32
    length: int = 256
    lr: float = 7e-4
    other_weight: float = 0.2
    seed: int = 0
    save_every: int = 100


def build_backbone(tokenizer, seed: int) -> Qwen3ForCausalLM:
    """The untrained model, float32, about 1 M parameters, with the structured start."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=3 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        initializer_range=EMBEDDING_STD,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    structured_start(model)
    return model


@torch.no_grad()
def structured_start(model: Qwen3ForCausalLM) -> None:
    """Attention that begins as similarity and copying; two heads of layer 0 begin by looking one token back."""
    # A direction that every embedding has: Qwen3's projections have no bias, and "one token back" needs a constant.
    constant = F.normalize(torch.randn(HIDDEN), dim=0)
    model.model.embed_tokens.weight += constant * EMBEDDING_STD * HIDDEN**0.5
    for layer in model.model.layers:
        attention = layer.self_attn
        torch.nn.init.orthogonal_(attention.k_proj.weight)
        torch.nn.init.orthogonal_(attention.v_proj.weight)
        attention.q_proj.weight.copy_(attention.k_proj.weight)
        attention.o_proj.weight.copy_(attention.v_proj.weight.t() * EMBEDDING_STD)
        for norm in (attention.q_norm, attention.k_norm):
            norm.weight.fill_(1.5)
    fast = 5  # of RoPE's frequencies, the fastest: they tell neighbours apart
    angle = 10000.0 ** -(torch.arange(fast) * 2 / HEAD_DIM)
    key, query = torch.zeros(HEAD_DIM), torch.zeros(HEAD_DIM)
    key[:fast] = 1.0
    query[:fast], query[HEAD_DIM // 2 :][:fast] = angle.cos(), -angle.sin()
    first = model.model.layers[0].self_attn
    for head in range(2):
        rows = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
        first.k_proj.weight[rows] += 3 * torch.outer(key, constant)
        first.q_proj.weight[rows] += 3 * torch.outer(query, constant)


class Texts:
    """Rows of token ids, and which of them are answers, drawn without end."""

    def __init__(self, tokenizer, random: Random):
        self.tokenizer, self.random = tokenizer, random
        self.user, self.assistant = (tokenizer.convert_tokens_to_ids(f"<|{r}|>") for r in ("user", "assistant"))
        self.end = tokenizer.eos_token_id

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"]

    def terse(self, most_facts: int) -> tuple[list[int], list[bool]]:
        """Keys and values in a list, then asked for: by repeating the list, or by questions of one word."""
        random = self.random
        facts = task.draw_facts(random, random.randint(2, most_facts), held_out=False)
        # With replacement: who is asked for next must not follow from who was asked for before.
        again = [random.choices(range(len(facts)), k=len(facts)) for _ in range(2)]
        keys, values = self._encode([f.key for f in facts]), self._encode([f.value for f in facts])
        colon, dot, mark = (self.tokenizer.convert_tokens_to_ids(sign) for sign in (":", ".", "?"))
        between = [colon] if random.random() < 0.25 else []
        ids, answers = [self.user], [False]

        def say(before: list[int], value: list[int], after: list[int], asked: bool) -> None:
            ids.extend(before + value + after)
            answers.extend([False] * len(before) + [asked] * len(value) + [False] * len(after))

        for i in range(len(facts)):
            say(keys[i] + between, values[i], [dot], False)
        questions = random.random() < 0.5
        for i in [i for order in again for i in order]:
            if questions:
                say([self.end, self.user, *keys[i], mark, self.end, self.assistant], values[i], [], True)
            else:
                say(keys[i] + between, values[i], [dot], True)
        return ids + [self.end], answers + [False]

    def conversation(self, most_facts: int) -> tuple[list[int], list[bool]]:
        """A conversation; answers of one token are what is asked for."""
        messages = task.conversation(self.random, most_facts)
        ids, answers = [], []
        for message, content in zip(messages, self._encode([m["content"] for m in messages])):
            replies = message["role"] == "assistant"
            ids += [self.assistant if replies else self.user, *content, self.end]
            answers += [False] + [replies and len(content) == 1] * len(content) + [False]
        return ids, answers

    def batch(self, rows: int, length: int, draw, most_facts: int) -> tuple[torch.Tensor, torch.Tensor]:
        """[rows, length] token ids and answers; texts follow one another and the last is cut."""
        all_ids, all_answers = [], []
        for _ in range(rows):
            ids, answers = [], []
            while len(ids) < length:
                more_ids, more_answers = draw(most_facts)
                ids += more_ids
                answers += more_answers
            all_ids.append(ids[:length])
            all_answers.append(answers[:length])
        return torch.tensor(all_ids), torch.tensor(all_answers)


def losses(model, ids: torch.Tensor, answers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean cross-entropy of the answers and of all else, and the share of answers that are the likeliest token."""
    with torch.autocast(ids.device.type, torch.bfloat16):
        logits = model(ids, use_cache=False).logits[:, :-1]
    target, asked = ids[:, 1:], answers[:, 1:]
    each = F.cross_entropy(logits.flatten(0, 1).float(), target.flatten(), reduction="none").view(target.shape)
    right = (logits.argmax(-1) == target)[asked].float().mean()
    return each[asked].mean(), each[~asked].mean(), right


class Run:
    """A training run: model, optimizer, data and place, which a checkpoint holds all of."""

    def __init__(self, options: BackboneOptions, output: Path, device: torch.device, compile_model: bool):
        self.options, self.output, self.device = options, output, device
        self.tokenizer = build_tokenizer()
        self.model = build_backbone(self.tokenizer, options.seed).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=options.lr, betas=(0.9, 0.98), weight_decay=0.01)
        self.forward = torch.compile(self.model) if compile_model else self.model
        self.texts = Texts(self.tokenizer, Random(options.seed + 1))
        self.first_steps = self.step = 0  # steps of the first phase; steps of the second
        self.first_phase = True
        self.log: list[dict] = []
        self.seconds = 0.0

    def save(self) -> None:
        """Everything that the run needs to go on, atomically."""
        place = {"first_phase": self.first_phase, "first_steps": self.first_steps, "step": self.step}
        checkpoint.save(
            self.output, asdict(self.options), self.model.state_dict(), self.optimizer, self.texts.random,
            **place, log=self.log, seconds=self.seconds,
        )  # fmt: skip

    def restore(self) -> None:
        """Go on from the checkpoint in ``output``, if there is one.

        Raises:
            ValueError: it was made with other options.
        """
        found = checkpoint.load(self.output, asdict(self.options), self.device)
        if found is not None:
            checkpoint.restore(found, self.optimizer, self.texts.random)
            self.model.load_state_dict(found["model"])
            vars(self).update(found["place"])

    def _batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        rows, length = self.options.rows, self.options.length
        if self.first_phase:
            return self.texts.batch(rows * 3 // 4, length * 3 // 8, self.texts.terse, 4)
        done = self.step / self.options.steps
        most_facts = 4 if done < 0.2 else 8 if done < 0.7 else 24
        if done >= 0.75:
            rows, length = rows // 2, 2 * length
        return self.texts.batch(rows, length, self.texts.conversation, most_facts)

    def _lr(self) -> float:
        warm_up = min(1.0, (self.first_steps + self.step + 1) / 100)
        cosine = 0.5 * (1 + math.cos(math.pi * self.step / self.options.steps))
        return self.options.lr * warm_up * (0.05 + 0.95 * cosine)

    def advance(self) -> dict:
        """One step; returns its figures."""
        started = time.perf_counter()
        ids, answers = (tensor.to(self.device) for tensor in self._batch())
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr()
        answer_loss, other_loss, right = losses(self.forward, ids, answers)
        self.optimizer.zero_grad()
        (answer_loss + (0.5 if self.first_phase else self.options.other_weight) * other_loss).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        figures = {
            "phase": 1 if self.first_phase else 2, "step": self.first_steps + self.step,
            "answer_loss": answer_loss.item(), "other_loss": other_loss.item(), "right": right.item(),
        }  # fmt: skip
        self.log.append(figures)
        if self.first_phase:
            self.first_steps += 1
            recent = [entry["right"] for entry in self.log[-20:]]
            self.first_phase = len(recent) < 20 or sum(recent) / 20 <= 0.9
        else:
            self.step += 1
        self.seconds += time.perf_counter() - started
        return figures


def train_backbone(options: BackboneOptions, output: Path, device: str = "cpu", compile_model: bool = False) -> dict:
    """Train, or go on with, the backbone and write it with its tokenizer into ``output``; returns its figures.

    Args:
        options: of the run; a checkpoint found in ``output`` must have the same.
        output: a directory, made if needed.
        device: where to train.
        compile_model: use torch.compile: a third faster on two cores.

    Raises:
        RuntimeError: the first phase did not come to its end, so a memory could bind nothing.
    """
    output.mkdir(parents=True, exist_ok=True)
    run = Run(options, output, torch.device(device), compile_model)
    run.restore()
    with tqdm(total=options.steps, initial=run.step, desc="backbone", unit="step") as bar:
        while run.step < options.steps:
            if run.first_phase and run.first_steps >= options.most_first_steps:
                raise RuntimeError(
                    f"backbone: after {run.first_steps} steps it does not recall lists yet; try another --seed"
                )
            figures = run.advance()
            bar.set_postfix(
                phase=figures["phase"], right=f"{figures['right']:.2f}", loss=f"{figures['answer_loss']:.2f}"
            )
            bar.update(figures["phase"] == 2)
            if figures["step"] % options.save_every == options.save_every - 1:
                run.save()
    model = run.model.float().eval()
    model.save_pretrained(output)
    run.tokenizer.save_pretrained(output)
    last = run.log[-50:]
    figures = {
        "parameters": sum(p.numel() for p in model.parameters()), "first_phase_steps": run.first_steps,
        "steps": run.step, "seconds": round(run.seconds, 1), "options": asdict(options),
        **{name: sum(entry[name] for entry in last) / len(last) for name in ("answer_loss", "other_loss", "right")},
    }  # fmt: skip
    write_json(output / "training.json", figures, private=False)
    checkpoint.remove(output)
    return figures
