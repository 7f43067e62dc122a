"""Episodes as tokens: what the tokenizer's chat template makes of an example, and batches of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.utils.data import Dataset

from ..config import DeltaMemConfig
from ..errors import ArgumentError
from ..text.encode import attention_mask, padded
from ..text.messages import plain_messages
from .data import Example
from .loss import IGNORED, EpisodeBatch

# What the read part of an episode sees: the visible turns and the memory, the last user turn and the memory, or the
# visible turns and an empty memory.
KINDS = ("both", "state_only", "no_memory")


@dataclass(frozen=True)
class Episode:
    """One example as token ids.

    Attributes:
        write_ids: of the write context; empty = the memory starts empty.
        read_ids: of the read part and its answer.
        labels: as long as read_ids, −100 but on the answer's tokens, its end-of-turn token included.
        segment_ids: as long as write_ids (SSW), or None.
        kind: one of ``KINDS``.
    """

    write_ids: list[int]
    read_ids: list[int]
    labels: list[int]
    segment_ids: list[int] | None = None
    kind: str = "both"

    @property
    def writes(self) -> bool:
        """Whether a token of the write context is written."""
        return bool(self.write_ids) if self.segment_ids is None else max(self.segment_ids, default=-1) >= 0


def build_episode(tokenizer, config: DeltaMemConfig, example: Example, kind: str = "both") -> Episode:
    """Tokenise an example through the tokenizer's chat template.

    The write context is rendered as a chat of its own, without a generation prompt, and in SSW with the segment ids
    of ``segment_ids_from_messages``. The read part is rendered with its generation prompt, then the answer follows as
    the template renders it, up to its end-of-turn token; only that has labels. A template that opens an answer with
    an empty think block has it in its generation prompt if ``enable_thinking=False`` puts it there: it is no label.

    Args:
        tokenizer: with a chat template; a fast one for SSW.
        config: the adapter's, for its ``memory_write_granularity``.
        example: what to tokenise.
        kind: ``both``: the example as it is. ``state_only``: the last user turn alone is read, the turns before it
            are written. ``no_memory``: nothing is written. What is read from an empty memory is 0, so such an episode
            is the bare backbone's: it has no gradient and tells what the backbone does alone.

    Raises:
        ValueError: naming file and line: the template refuses the messages, or renders the answer otherwise than its
            generation prompt announces.
    """
    try:
        if kind == "state_only":
            example = example.state_only()
        write_ids, segment_ids = [], [] if config.segmented else None
        if example.write and kind != "no_memory":
            write_ids, segment_ids = _tokenise_write(tokenizer, config, plain_messages(example.write, "write"))
        (answer,) = plain_messages([example.answer], "answer")
        read_ids, start = _tokenise_read(tokenizer, plain_messages(example.read, "read"), answer)
    except Exception as error:  # templates raise errors of their own
        raise ArgumentError(f"{example.where}: {error}") from error
    labels = [IGNORED] * start + read_ids[start:]
    return Episode(write_ids, read_ids, labels, segment_ids, kind)


def _tokenise_write(tokenizer, config: DeltaMemConfig, messages: list[dict]) -> tuple[list[int], list[int] | None]:
    if not config.segmented:
        return _tokenise(tokenizer, tokenizer.apply_chat_template(messages, tokenize=False)), None
    from ..text.segments import segment_ids_from_messages

    ids, segments = segment_ids_from_messages(tokenizer, messages, config.memory_write_granularity)
    return ids[0].tolist(), segments[0].tolist()


def _tokenise_read(tokenizer, messages: list[dict], answer: dict) -> tuple[list[int], int]:
    """Token ids of the read part with its answer, and where the answer begins."""
    text = tokenizer.apply_chat_template([*messages, answer], tokenize=False)
    prompts = [
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **thinking)
        for thinking in ({}, {"enable_thinking": False})
    ]
    prompts = [prompt for prompt in prompts if text.startswith(prompt) and len(prompt) < len(text)]
    if not prompts:
        raise ArgumentError("the chat template renders the answer other than its generation prompt announces")
    prompt = max(prompts, key=len)
    ids, prompt_ids = _tokenise(tokenizer, text), _tokenise(tokenizer, prompt)
    # Where a token spans the end of the prompt, it is the answer's.
    start = next((i for i, (a, b) in enumerate(zip(ids, prompt_ids)) if a != b), len(prompt_ids))
    end = len(ids)
    # Templates put a line break behind the end-of-turn token; nothing is ever generated there.
    while end > start + 1 and not tokenizer.decode(ids[end - 1 : end]).strip():
        end -= 1
    return ids[:end], start


def _tokenise(tokenizer, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, padding=False, truncation=False)["input_ids"])


def collate(episodes: Sequence[Episode], pad_token_id: int = 0) -> EpisodeBatch:
    """One batch of episodes, padded on the right with masks.

    An empty write context becomes one masked token: a batch in which nobody writes still runs through all of the
    adapter, as distributed training wants it.
    """
    written, read = [e.write_ids for e in episodes], [e.read_ids for e in episodes]
    return EpisodeBatch(
        padded(written, pad_token_id),
        attention_mask(written).bool(),
        padded(read, pad_token_id),
        attention_mask(read).bool(),
        padded([e.labels for e in episodes], IGNORED),
        None if episodes[0].segment_ids is None else padded([e.segment_ids for e in episodes], -1),
    )


def collate_arguments(episodes: Sequence[Episode], pad_token_id: int = 0) -> dict[str, torch.Tensor]:
    """``collate`` as the Trainer hands it on: a dict of tensors, with ``kinds``, int64 [B], places in ``KINDS``."""
    batch = {name: tensor for name, tensor in vars(collate(episodes, pad_token_id)).items() if tensor is not None}
    return batch | {"kinds": torch.tensor([KINDS.index(episode.kind) for episode in episodes], device="cpu")}


@dataclass(eq=False)
class EpisodeSchedule(Dataset):
    """The whole training run as a sequence of episodes; each is a function of the seed and its place alone.

    So a run that resumes at place n goes on as if it had not stopped, whatever the workers and devices are.

    Args:
        examples: to draw from; each comes once before any comes again.
        build: (example, kind) → Episode.
        length: how many episodes the run takes.
        seed: of order and kinds.
        state_only, no_memory: probabilities of these kinds.
    """

    examples: Sequence[Example]
    build: Callable[[Example, str], Episode]
    length: int
    seed: int
    state_only: float = 0.0
    no_memory: float = 0.0
    _order: tuple[int, np.ndarray] = field(default=(-1, np.empty(0)), init=False)  # of an epoch

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, place: int) -> Episode:
        return self.build(self.examples[self.example_at(place)], self.kind_at(place))

    def example_at(self, place: int) -> int:
        """Which example stands at a place of the run."""
        epoch, within = divmod(place, len(self.examples))
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.examples)))
        return int(self._order[1][within])

    def kind_at(self, place: int) -> str:
        """The kind of the episode at a place of the run."""
        drawn = np.random.default_rng([self.seed, 1, place]).random()
        if drawn < self.no_memory:
            return "no_memory"
        return "state_only" if drawn < self.no_memory + self.state_only else "both"
