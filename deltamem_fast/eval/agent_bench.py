"""MemoryAgentBench (Hu et al. 2025): what an agent keeps of what it is told in chunks, in four competencies.

Rows of the data: ``context``, ``questions``, ``answers`` (of each question a text or a list of accepted ones), and
``metadata`` with ``source``, by which a row is asked and scored. How an answer is read and scored is the authors'
(utils/eval_other_utils.py and the table of their README); the instructions say the same in our words.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import ArgumentError, FileFormatError, FileMissingError
from ..storage.files import read_json
from .data import Document, Question, Task
from .metrics import best, exact_match, f1, mean, spaced, substring_match
from .movies import recall_at_5
from .records import ENDINGS, field, read_records

HUB_ID = "ai-hyz/MemoryAgentBench"
SPLITS = ("Accurate_Retrieval", "Test_Time_Learning", "Long_Range_Understanding", "Conflict_Resolution")
ENTITIES = "entity2id.json"

_DATA = "data of memory-agent-bench"
_WHERE = (
    f"it is the data set {HUB_ID} of https://huggingface.co/datasets ({', '.join(SPLITS)}; MIT); download it and give "
    "the directory with its .parquet, .json or .jsonl files"
)
# The protocol cuts a context at ends of sentences into chunks of 4,096 tokens of GPT-4o's tokenizer: about 4 characters
# each in English. Files cannot know the model's tokenizer; a memory takes a chunk in pieces of its own.
_CHUNK_CHARACTERS = 4096 * 4
_SENTENCE = re.compile(r".+?(?:\n+|(?<=[.!?])\s+|\Z)", re.DOTALL)
_ANSWER = re.compile(r"answer:(.*)(?:\n|$)", re.IGNORECASE)


@dataclass(frozen=True)
class Family:
    """How the questions of some sources are asked and scored.

    Attributes:
        begins: what their sources begin with.
        competency: the benchmark's name of what they test.
        dataset: of the competency, as the paper's table has them; sources that differ in length alone are one.
        instruction: with ``{question}``.
        scored: ``substring``, ``exact``, ``recall@5``, or ``judge``.
        new_tokens: at most, of an answer.
        read: ``first line``: that alone counts, or what stands behind "Answer:"; ``either``: that or the whole answer.
    """

    begins: str
    competency: str
    dataset: str
    instruction: str
    scored: str
    new_tokens: int
    read: str = "either"


_BRIEF = "Give nothing but the answer.\n\nQuestion: {question}\n\nAnswer:"
_DOCUMENTS = "Answer from the documents that you have been told. " + _BRIEF
_CLASSES = (
    "You were told examples with numbers as labels. Give the label of the following text, as they do: write the number "
    "and nothing else.\n\n{question}\n\nlabel:"
)
_FACTS = (
    "You keep numbered facts, and of two that contradict each other the one with the higher number is newer and holds. "
    "Answer very briefly, from those facts alone, even where the real world differs.\n\n"
    "Question: {question}\n\nAnswer:"
)
_EVENTS = "Do the following from the book that you have been told.\n\n{question}\n\nThe next event is:"
_CHATS = (
    "You were told your earlier chats with a user. Answer from them as briefly as you can, with a single phrase if "
    "that will do.\n\n{question}\n\nAnswer:"
)
_MOVIES = (
    "You recommend movies, as in the dialogues that you have been told. After the following conversation with a user, "
    "give 20 recommendations as a numbered list, a title a line, and nothing else.\n\n"
    "{question}\n\nThe recommendations are:\n"
)
_CRIME = "Answer the following from the book that you have been told, exactly in the form asked for.\n\n{question}\n\n"
_SUMMARY = "You have been told a book. Summarise it.\n\n{question}\n\nNow write the summary."

_RETRIEVAL, _LEARNING, _UNDERSTANDING, _CONFLICTS = (split.replace("_", " ").lower() for split in SPLITS)

FAMILIES = (
    Family("ruler_qa1", _RETRIEVAL, "single-hop documents", _DOCUMENTS, "substring", 50),
    Family("ruler_qa2", _RETRIEVAL, "multi-hop documents", _DOCUMENTS, "substring", 50),
    Family("eventqa", _RETRIEVAL, "events", _EVENTS, "substring", 40, "first line"),
    Family("longmemeval", _RETRIEVAL, "LongMemEval", _CHATS, "judge", 50),
    Family("icl_banking77", _LEARNING, "Banking77", _CLASSES, "exact", 20, "first line"),
    Family("icl_clinic150", _LEARNING, "Clinic150", _CLASSES, "exact", 20, "first line"),
    Family("icl_nlu", _LEARNING, "NLU", _CLASSES, "exact", 20, "first line"),
    Family("icl_trec_coarse", _LEARNING, "TREC coarse", _CLASSES, "exact", 20, "first line"),
    Family("icl_trec_fine", _LEARNING, "TREC fine", _CLASSES, "exact", 20, "first line"),
    Family("recsys_redial", _LEARNING, "recommendation", _MOVIES, "recall@5", 300),
    Family("detective_qa", _UNDERSTANDING, "detective novels", _CRIME, "exact", 2000),
    Family("infbench_sum", _UNDERSTANDING, "summaries", _SUMMARY, "judge", 1200),
    Family("factconsolidation_sh", _CONFLICTS, "single-hop facts", _FACTS, "substring", 10),
    Family("factconsolidation_mh", _CONFLICTS, "multi-hop facts", _FACTS, "substring", 10),
)


def family_of(source: str) -> Family | None:
    """The family of a row's ``metadata.source``; None: of no known one."""
    return next((family for family in FAMILIES if source.startswith(family.begins)), None)


def load(path: Path | None) -> list[Document]:
    """One document for each row, its context in chunks of whole sentences; a question's category is its row's source.

    Args:
        path: a file (.json, .jsonl, .parquet), or a directory with such files, of which all are read in the order of
            their names; ``entity2id.json`` of the data set beside them is needed to score recommendations. None: the
            data set from the hub.

    Raises:
        ArgumentError, FileMissingError: there is no data; says where it is.
        FileAccessError, FileFormatError: it cannot be read, or is of another format; names the row.
        MissingPackageError: a parquet file without pyarrow.
    """
    path = _from_hub() if path is None else path
    if not path.exists():
        raise FileMissingError(f"{_DATA}: {path}: no such file or directory; {_WHERE}")
    files, folder = ([path], path.parent) if path.is_file() else (_files(path), path)
    entities = str(folder / ENTITIES) if (folder / ENTITIES).is_file() else None
    _entities.cache_clear()
    rows = [(f"{_DATA}: {file}: row {i}", row) for file in files for i, row in enumerate(read_records(file, _DATA))]
    if not rows:
        raise FileFormatError(f"{_DATA}: {path}: has no row; {_WHERE}")
    counts: dict[str, int] = {}
    documents = []
    for where, row in rows:
        source = field(field(row, "metadata", dict, where), "source", str, where)
        counts[source] = counts.get(source, -1) + 1
        documents.append(_document(row, source, f"{source}-{counts[source]}", entities, where))
    return documents


def _files(folder: Path) -> list[Path]:
    found = sorted(
        file for file in folder.rglob("*") if file.suffix in ENDINGS and file.name != ENTITIES and file.is_file()
    )
    if not found:
        raise ArgumentError(f"{_DATA}: {folder}: holds no {', '.join(ENDINGS)} file; {_WHERE}")
    return found


def _from_hub() -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(HUB_ID, repo_type="dataset", allow_patterns=["data/*.parquet", f"*{ENTITIES}"]))
    except Exception as error:  # of the hub, of the HTTP library that its version uses, of the system
        reason = str(error).split("\n")[0][:200]
        raise FileMissingError(f"{_DATA}: got no file, and the hub cannot be reached ({reason}); {_WHERE}") from error


def _document(row: dict[str, Any], source: str, name: str, entities: str | None, where: str) -> Document:
    family = family_of(source)
    if family is None:
        known = ", ".join(f"{one.begins}*" for one in FAMILIES)
        raise FileFormatError(f"{where}: metadata.source: got {source!r:.80}, allowed {known}")
    parts = chunks_of(field(row, "context", str, where))
    asked, accepted = field(row, "questions", (list, str), where), field(row, "answers", (list, str), where)
    asked = [asked] if isinstance(asked, str) else asked
    accepted = [accepted] if isinstance(accepted, str) else accepted
    if len(asked) == 1 and not (len(accepted) == 1 and isinstance(accepted[0], list)):
        accepted = [accepted]  # all of them answer the one question
    if not parts or not asked or len(asked) != len(accepted):
        raise FileFormatError(f"{where}: has {len(asked)} questions and {len(accepted)} answers, or no context")
    questions = []
    for i, (question, answers) in enumerate(zip(asked, accepted)):
        here = f"{where}: question {i}"
        text = field({"question": question}, "question", str, here)
        answers = tuple(str(one) for one in (answers if isinstance(answers, list) else [answers]))
        if not answers:
            raise FileFormatError(f"{here}: has no answer")
        more = {"new_tokens": family.new_tokens, **_more(row["metadata"], family, i, answers, entities, here)}
        questions.append(
            Question(f"{name}-q{i}", family.instruction.format(question=text), answers, source, text, more)
        )
    return Document(name, parts, tuple(questions))


def _more(
    metadata: dict, family: Family, place: int, answers: tuple[str, ...], entities: str | None, where: str
) -> dict[str, Any]:
    """What scoring one question needs beyond its answers."""

    def of_this(key: str) -> Any:
        values = metadata.get(key)
        return values[place] if isinstance(values, list) and place < len(values) else None

    if family.begins == "longmemeval":
        abstains = "_abs" in str(of_this("question_ids") or "")
        return {"judge": "abstention" if abstains else str(of_this("question_types") or "single-session-user")}
    if family.begins == "infbench_sum":
        points = metadata.get("keypoints") or []
        if not isinstance(points, list):
            raise FileFormatError(f"{where}: metadata.keypoints: got a {type(points).__name__}, allowed a list")
        points = [str(point) for point in points]
        return {"judge": "summary", "key_points": points} | ({} if points else {"needs": "keypoints in its metadata"})
    if family.scored == "recall@5":
        if entities is None:
            return {"needs": f"{ENTITIES} of the data set beside the data, which maps movies to numbers"}
        titles = _entities(entities)
        known = [titles[answer.strip()] for answer in answers if answer.strip() in titles]
        return {"titles": known, "entities": entities} if known else {"needs": f"a movie of {ENTITIES} as answer"}
    return {}


@functools.lru_cache(maxsize=1)
def _entities(path: str) -> dict[str, str]:
    """Number → movie, of the data set's table movie → number."""
    return {str(value): name for name, value in read_json(path, _DATA).items()}


def chunks_of(context: str) -> tuple[str, ...]:
    """A text in pieces of whole sentences or lines, each of at most 16,384 characters unless one sentence is longer."""
    chunks, chunk = [], ""
    for sentence in _SENTENCE.findall(context):
        if chunk and len(chunk) + len(sentence) > _CHUNK_CHARACTERS:
            chunks.append(chunk.strip())
            chunk = ""
        chunk += sentence
    chunks.append(chunk.strip())
    return tuple(chunk for chunk in chunks if chunk)


def score(question: Question, answer: str) -> float | None:
    """The published score, 0 to 1; None where only a judge can tell, or ``more["needs"]`` says what is missing."""
    family = family_of(question.category)
    if family.scored == "judge" or "needs" in question.more:
        return None
    if family.scored == "recall@5":
        return recall_at_5(answer, question.more["titles"], tuple(_entities(question.more["entities"]).values()))
    measure = substring_match if family.scored == "substring" else exact_match
    told = best(measure, said(answer), question.answers)
    return told if family.read == "first line" else max(told, best(measure, answer, question.answers))


def said(answer: str) -> str:
    """What stands behind "Answer:" up to the end of its line, or else the first line."""
    found = _ANSWER.search(answer)
    text = (found[1] if found else answer.split("\n", 1)[0]).strip()
    return text[7:].strip() if text.lower().startswith("answer:") else text


def score_as_paper(question: Question, answer: str) -> float | None:
    """The score of the δ-mem paper's code, 0 to 1; None where ``more["needs"]`` says what is missing.

    Recall@5 of recommendations, F1 of a summary's words, and of all else whether an accepted answer stands in the
    answer, parts of words counted.
    """
    family, given = family_of(question.category), spaced(answer)
    if family.scored == "recall@5":
        return score(question, answer)
    accepted = [spaced(one) for one in question.answers]
    if family.begins == "infbench_sum":
        lines = [given, spaced(next((line for line in answer.splitlines() if line.strip()), ""))]
        return max((f1(line.split(), one.split()) for line in lines for one in accepted), default=0.0)
    return float(any(one and one in given for one in accepted))


def load_for_paper(path: Path | None) -> list[Document]:
    """``load``, with no question for a judge."""

    def unjudged(question: Question) -> Question:
        if "judge" not in question.more:
            return question
        return replace(question, more={"new_tokens": question.more["new_tokens"]})

    return [replace(one, questions=tuple(map(unjudged, one.questions))) for one in load(path)]


def question_mean(scores: Mapping[str, Sequence[float]]) -> dict[str, float | None]:
    """``overall``: over all questions alike, as the δ-mem paper's code does."""
    return {"overall": overall(scores)["question_mean"]}


def overall(scores: Mapping[str, Sequence[float]]) -> dict[str, float | None]:
    """``overall``: the mean over the four competencies, each the mean over its data sets; None unless each has a score.

    Further, each competency under its name, and ``question_mean``: over all questions, as the δ-mem paper's code does.
    """
    found: dict[str, dict[str, list[float]]] = {competency: {} for competency in _competencies()}
    for source, values in scores.items():
        family = family_of(source)
        found[family.competency].setdefault(family.dataset, []).extend(values)
    figures: dict[str, float | None] = {}
    for competency, datasets in found.items():
        figures[competency] = mean(mean(values) for values in datasets.values() if values)
    whole = [value for value in figures.values() if value is not None]
    return {
        "overall": mean(whole) if len(whole) == len(figures) else None,
        **figures,
        "question_mean": mean(value for values in scores.values() for value in values),
    }


def _competencies() -> tuple[str, ...]:
    return tuple(dict.fromkeys(family.competency for family in FAMILIES))


TASK = Task(
    name="memory-agent-bench",
    title="MemoryAgentBench",
    load=load,
    score=score,
    prompt="{context}\n\n{question}",
    new_tokens=50,
    metric="score by source",
    notes=(
        "The overall score is the mean over the four competencies, each the mean over its data sets, as published; "
        "a competency without a scored question leaves it open.",
        "Scores are substring match (ruler_qa*, eventqa_*, factconsolidation_*), exact match (icl_*, detective_qa), "
        "Recall@5 (recsys_redial_*).",
        "longmemeval_* and infbench_sum are scored by a judge alone; without one they are left out and counted.",
        "icl_* is scored strictly, as published: the label alone, not 'label: 43'; the instruction asks for that.",
        "The δ-mem paper's code scores every source but recommendation and summaries by substring match, without a "
        "judge, and weights questions alike, so that its figures cannot be compared with these.",
        "Instructions are in our words and say what the authors' say.",
    ),
    overall=overall,
)

AS_PAPER = replace(
    TASK,
    name="memory-agent-bench-paper",
    title="MemoryAgentBench, as the δ-mem paper's code scores it",
    load=load_for_paper,
    score=score_as_paper,
    metric="substring match (recommendations: Recall@5; summaries: F1)",
    notes=(
        "No judge is asked, and questions are weighted alike: scores of the δ-mem paper's code, instructions of ours.",
        "That code's script cuts a context at 120,000 characters; here the policy alone decides what is read. Both "
        "take the likeliest token.",
    ),
    overall=question_mean,
)
