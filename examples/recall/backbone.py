"""The backbone of the recall proof: a small Qwen3 trained from scratch until it recalls what its context states.

Loss is taken on the answers, and with a small weight on all other tokens, so that it is a language model of its world
too. First come terse lists of keys and values, whose answers are found all at once after some hundred steps, then
conversations.

From a random start this model needs thousands of steps to find out that a value stands behind its key. The start here
is structured, after A. Trockman and J. Z. Kolter, Mimetic Initialization of Self-Attention Layers (2023): queries and
keys alike, values and outputs transposed; two heads of the first layer begin by looking one token back. Everything is
trained from there.
"""

from __future__ import annotations

import shutil
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset
from transformers import Qwen3Config, Qwen3ForCausalLM, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from deltamem_fast.recall import task
from deltamem_fast.recall.tokenizer import build_tokenizer
from deltamem_fast.storage.files import read_json, write_json

LAYERS, HIDDEN, HEADS, HEAD_DIM = 4, 128, 4, 32
EMBEDDING_STD = 0.05
FIGURES = ("answer_loss", "other_loss", "right")


@dataclass(frozen=True)
class BackboneOptions:
    """How the backbone is trained.

    Attributes:
        terse_steps: of lists of keys and values, which come first.
        steps: of conversations.
        rows, length: of a batch, in tokens; lists take three quarters as many rows of three eighths the length, the
            last quarter of the conversations half as many rows twice as long.
        lr: of AdamW, cosine to a twentieth.
        other_weight: of the loss on tokens that are no answers.
        least_right: share of the answers that must be right at the end.
        seed: of weights and data.
        save_every: steps between checkpoints.
    """

    terse_steps: int = 600
    steps: int = 1500
    rows: int = 32
    length: int = 256
    lr: float = 7e-4
    other_weight: float = 0.2
    least_right: float = 0.9
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


class Batches(Dataset):
    """The batch of each step; it follows from the seed and the step alone, so that a run can be taken up again."""

    def __init__(self, tokenizer, options: BackboneOptions):
        self.tokenizer, self.options = tokenizer, options

    def __len__(self) -> int:
        return self.options.terse_steps + self.options.steps

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        options = self.options
        texts = Texts(self.tokenizer, Random(f"{options.seed} {step}"))
        rows, length, terse = options.rows, options.length, step < options.terse_steps
        if terse:
            ids, answers = texts.batch(rows * 3 // 4, length * 3 // 8, texts.terse, 4)
        else:
            done = (step - options.terse_steps) / options.steps
            most_facts = 4 if done < 0.2 else 8 if done < 0.7 else 24
            if done >= 0.75:
                rows, length = rows // 2, 2 * length
            ids, answers = texts.batch(rows, length, texts.conversation, most_facts)
        other_weight = torch.tensor(0.5 if terse else options.other_weight)
        return {"input_ids": ids, "answers": answers, "other_weight": other_weight}


class BackboneTrainer(Trainer):
    """The Trainer with a loss that tells answers from all other tokens.

    Its log has the last 50 steps' mean ``answer_loss``, ``other_loss`` and ``right``, the share of answers that are the
    likeliest token.
    """

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        self.recent: deque[torch.Tensor] = deque(maxlen=50)  # [3], in the order of FIGURES

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        logits = model(inputs["input_ids"], use_cache=False).logits[:, :-1]
        target, asked = inputs["input_ids"][:, 1:], inputs["answers"][:, 1:]
        each = F.cross_entropy(logits.transpose(1, 2).float(), target, reduction="none")
        answer, other = each[asked].mean(), each[~asked].mean()
        right = (logits.argmax(-1) == target)[asked].float().mean()
        self.recent.append(torch.stack([answer, other, right]).detach())
        loss = answer + inputs["other_weight"] * other
        return (loss, logits) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The Trainer's, with these figures."""
        if self.recent:
            means = torch.stack(list(self.recent)).mean(0).tolist()
            logs = logs | {name: round(mean, 4) for name, mean in zip(FIGURES, means)}
        super().log(logs, start_time)


def train_backbone(options: BackboneOptions, output: Path) -> dict:
    """Train, or go on with, the backbone and write it with its tokenizer into ``output``; returns its figures.

    Raises:
        RuntimeError: it does not find what its context states, so a memory could bind nothing.
        ValueError: a run in ``output`` that has other options.
    """
    started = output / "options.json"
    if started.is_file() and read_json(started) != asdict(options):
        raise ValueError(f"output: {output} holds a run with {read_json(started)}; remove it, or give the same options")
    write_json(started, asdict(options), private=False)
    tokenizer = build_tokenizer()
    model = build_backbone(tokenizer, options.seed)
    batches = Batches(tokenizer, options)
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=len(batches),
        per_device_train_batch_size=1,  # an item is a batch
        train_sampling_strategy="sequential",
        learning_rate=options.lr,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.05},
        warmup_steps=100,
        weight_decay=0.01,
        adam_beta2=0.98,
        seed=options.seed,
        logging_steps=20,
        save_steps=options.save_every,
        save_total_limit=1,
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    trainer = BackboneTrainer(model, arguments, train_dataset=batches, data_collator=lambda items: items[0])
    found = trainer.train(resume_from_checkpoint=get_last_checkpoint(output))
    last = next(entry for entry in reversed(trainer.state.log_history) if "right" in entry)
    figures = {
        "options": asdict(options), "parameters": model.num_parameters(),
        "seconds": round(found.metrics["train_runtime"], 1), **{name: last[name] for name in FIGURES},
    }  # fmt: skip
    if figures["right"] < options.least_right:
        raise RuntimeError(f"backbone: {figures['right']:.0%} of the answers are right at the end; try another --seed")
    model.cpu().save_pretrained(output)
    tokenizer.save_pretrained(output)
    write_json(output / "training.json", figures, private=False)
    for checkpoint in output.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    started.unlink()
    return figures
