"""The words of the recall proof: names, codes, objects, places, and what is said of them.

A key (a person's name, an object) is two tokens and a value (a code, a place) one. Every fifth pair of a key's two
parts is held out: a held-out name is new as a name, while each of its syllables has been seen in others.
"""

from __future__ import annotations

import functools
import itertools

ONSETS = (
    "Bal Cor Dav El Fep Gar Hol Il Jor Kas Lum Mar Nev Or Pel Quir Ras Sol Tam Ul Ver Wil Yas Zor "
    "Brem Clav Drov Flem Gruf Pruk Stef Trom"
).split()
ENDINGS = (
    "ton rik mel vik sha bot ben gus pim fey zel mon ruth kar bo wen dag gol jin pus ruk zim "
    "via rok san hud mir vex not kil fum wat"
).split()
ADJECTIVES = "red green blue black white old new small big round heavy broken silver wooden paper glass".split()
NOUNS = (
    "lamp key book coat cup ring map box knife drum clock chair mirror rope bell candle basket hammer ladder letter "
    "pillow bottle carpet shovel"
).split()

CODES = tuple(str(number) for number in range(10, 60))
PLACES = (
    "cellar attic garden kitchen office garage library tower stable barn harbor market school temple station museum "
    "bakery forest meadow bridge castle chapel prison theater hotel tent cave mill yard hall"
).split()

NAME_PARTS = frozenset((*ONSETS, *ENDINGS))

HELD_OUT_EVERY = 5


def _pairs(first, second, joint: str, held_out: bool) -> tuple[str, ...]:
    # A diagonal of the table: each part occurs both in pairs that are trained on and in ones that are held out.
    return tuple(
        a + joint + b
        for (i, a), (j, b) in itertools.product(enumerate(first), enumerate(second))
        if ((i + j) % HELD_OUT_EVERY == 0) is held_out
    )


@functools.cache
def people(held_out: bool) -> tuple[str, ...]:
    """Names of people, of which the ones that are ``held_out`` occur in no training text."""
    return _pairs(ONSETS, ENDINGS, "", held_out)


@functools.cache
def objects(held_out: bool) -> tuple[str, ...]:
    """Objects, such as "old lamp", likewise."""
    return _pairs(ADJECTIVES, NOUNS, " ", held_out)


# What is said ("{key}" and "{value}" are filled in). The first of each kind is what the demo says.
STATEMENTS = {
    "code": (
        "The code of {key} is {value}.",
        "{key} has the code {value}.",
        "Remember that {key} uses {value}.",
        "{key}: {value}.",
    ),
    "place": (
        "The {key} is in the {value}.",
        "Somebody put the {key} in the {value}.",
        "You find the {key} in the {value}.",
        "{key}: {value}.",
    ),
}
UPDATES = {
    "code": ("Now the code of {key} is {value}.", "{key} has changed the code to {value}."),
    "place": ("Now the {key} is in the {value}.", "The {key} has moved to the {value}."),
}
QUESTIONS = {
    "code": ("What is the code of {key}?", "Which code has {key}?", "{key}?"),
    "place": ("Where is the {key}?", "Where do you find the {key}?", "{key}?"),
}
VALUES = {"code": CODES, "place": tuple(PLACES)}
KINDS = tuple(STATEMENTS)

# Sentences that state no fact.
SUBJECTS = "The rain,The wind,The dog,A child,My sister,The teacher,An old man,The train,Nobody,The river".split(",")
VERBS = "came,went,stood still,sang,waited,fell asleep,looked back,turned around,was late,laughed".split(",")
MANNERS = "all day,at night,in the morning,for an hour,without a word,as always,too soon,once more".split(",")
REMARKS = (
    "{person} was late again.",
    "Nobody likes the {object}.",
    "{person} sang all day.",
    "The {object} is heavy.",
)
SMALL_TALK = ("Tell me something.", "What happened then?")


def sentence(random, held_out: bool) -> str:
    """A sentence without a fact, sometimes with a name in it."""
    if random.random() < 0.2:
        remark = random.choice(REMARKS)
        return remark.format(person=random.choice(people(held_out)), object=random.choice(objects(held_out)))
    return f"{random.choice(SUBJECTS)} {random.choice(VERBS)} {random.choice(MANNERS)}."
