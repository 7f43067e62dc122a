"""Sentences that state no fact, in forms that are drawn too: a grammar, of which every fifth form is held out.

Talk that is drawn from a list of sentences teaches a memory to know the list. Here a sentence's form (its words, with
slots for names and values) is put together anew each time, out of the training texts' words. A form is held out by
the hash of its pattern, in which all subjects, verbs and manners are alike. ``HELD_OUT`` are written by hand, and are
held out too; a form with one of them and a word more may be trained on. What is held out is so among drawn forms: a
remark of the small talk ("Balton was late again.") may be of such a form.
"""

from __future__ import annotations

import re
import zlib

from . import world

SUBJECT, VERB, MANNER = "<subject>", "<verb>", "<manner>"
# Who or what something is said of. A key is among them, and is said nothing of that could be asked for.
WHO = ("{person}", "The {object}", SUBJECT, SUBJECT, "The {place}", "Somebody", "Something", "You")
DOES = (VERB, VERB, VERB, "has", "likes", "uses", "is", "was", "put", "find", "has moved", "has changed", "turned")
MORE = (
    "the {object}", "the {object}", "{person}", "a {noun}", "the code", "the {place}", "something", "you",
    "in the {place}", "in the {place}", "for {person}", "for the {object}", "to the {place}", "to {person}",
    "without the {object}", "without {person}", "around the {place}", "in the {object}", "of {person}",
    "as {person}", "{code}", "for {code}", "at the {place}", "once", "again", "always", "late", "heavy", "then",
    MANNER, MANNER,
)  # fmt: skip
STARTS = ("", "", "", "Now ", "Once ", "Then ", "Remember that ", "In the {place} ", "At night ", "What happened: ")
ENDS = (".", ".", ".", ".", "?", ":")
MOST = 4  # complements
# With one of these a key and a value in one sentence would state a fact, or seem to.
STATING = ("is", "has", "uses", "put", "find", "has moved", "has changed", "was")
# Some sound like a fact.
HELD_OUT = (
    "{person} waited for the {object} in the {place}.",
    "Somebody sang in the {place} at night.",
    "The teacher has the {object}.",
    "Nobody is in the {place}.",
    "My sister looked back for {person} in the morning.",
    "You find a child in the {place}.",
)
FOLDED = (
    (SUBJECT, ("Somebody", "Something", *world.SUBJECTS)), (VERB, world.VERBS), (MANNER, world.MANNERS),
)  # fmt: skip


def pattern(text: str) -> str:
    """A sentence with slots, with its subjects, verbs and manners each replaced by what they are; small letters."""
    found = text.lower()
    for mark, words in FOLDED:
        found = re.sub("|".join(rf"\b{re.escape(word.lower())}\b" for word in words), mark, found)
    return found


_SPARED = frozenset(map(pattern, HELD_OUT))


def is_held_out(text: str) -> bool:
    """Whether a sentence with slots is of a form that is kept out of training: every fifth, by a hash; ``HELD_OUT``."""
    found = pattern(text)
    return found in _SPARED or zlib.crc32(found.encode()) % world.HELD_OUT_EVERY == 0


def states(text: str) -> bool:
    """Whether a sentence with slots could state a fact: a key, a verb of the statements, and a value of its kind."""
    says = re.search("|".join(rf"\b{verb}\b" for verb in STATING), text) is not None or text.endswith(":")
    about = {"code": ("{person}", "{code}"), "place": ("{object}", "{place}")}
    return says and any(key in text and value in text for key, value in about.values())


def draw_form(random, held_out: bool) -> str:
    """A sentence with slots ``{person}``, ``{object}``, ``{place}``, ``{code}`` and ``{noun}``, and marks for subjects,
    verbs and manners; of the forms that are held out, or of the others."""
    while True:
        start, who = random.choice(STARTS), random.choice(WHO)
        if start and who.split()[0] in ("The", "Somebody", "Something", "You"):
            who = who[0].lower() + who[1:]
        parts = [who, random.choice(DOES), *random.choices(MORE, k=random.randint(0, MOST))]
        form = start + " ".join(parts) + random.choice(ENDS)
        if is_held_out(form) is held_out and not states(form):
            return form


def fill(random, form: str, held_out: bool) -> str:
    """The sentence: a name, value or word for each slot and mark, names ``held_out`` or of the training texts."""
    words = {
        "{person}": world.people(held_out), "{object}": world.objects(held_out), "{place}": world.PLACES,
        "{code}": world.CODES, "{noun}": world.NOUNS, SUBJECT: world.SUBJECTS, VERB: world.VERBS,
        MANNER: world.MANNERS,
    }  # fmt: skip
    return re.sub("|".join(map(re.escape, words)), lambda found: random.choice(words[found[0]]), form)


def sentence(random, held_out: bool) -> str:
    """A sentence without a fact, in a form that is drawn too; ``held_out``: form and names are not trained on."""
    return fill(random, draw_form(random, held_out), held_out)
