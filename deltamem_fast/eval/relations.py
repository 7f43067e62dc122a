"""What the suite ``changes`` tells: people, what can be said of them, and sentences that say nothing of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Relation:
    """Something that is true of a person, one value at a time.

    Attributes:
        values: none stands in another as whole words.
        told: how it is said first, with ``{person}`` and ``{value}``.
        updated: how it is said when it changes.
        questions: two with the same answer, with ``{person}``.
        premise: a question that takes ``{value}`` for granted, and asks for something that was never said.
    """

    values: tuple[str, ...]
    told: str
    updated: str
    questions: tuple[str, str]
    premise: str


PEOPLE = (
    "Ottilie",
    "Barnaby",
    "Zenobia",
    "Cosimo",
    "Perpetua",
    "Leofric",
    "Ludmila",
    "Torquil",
    "Amaryllis",
    "Ignatius",
    "Saskia",
    "Evander",
)

RELATIONS = (
    Relation(
        ("Lisbon", "Oslo", "Krakow", "Denver", "Nairobi", "Kyoto", "Dublin", "Lima"),
        "{person} lives in {value}.",
        "{person} has moved and lives in {value} now.",
        ("In which city does {person} live?", "What is the city where {person} lives these days?"),
        "What does {person} like most about living in {value}?",
    ),
    Relation(
        ("baker", "plumber", "nurse", "pilot", "lawyer", "florist", "welder", "librarian"),
        "{person} works as a {value}.",
        "{person} has changed jobs and works as a {value} now.",
        ("What is the job of {person}?", "What does {person} work as these days?"),
        "How long has {person} been working as a {value} by now?",
    ),
    Relation(
        ("tea", "coffee", "cocoa", "lemonade", "cider", "buttermilk", "espresso", "ginger ale"),
        "For breakfast {person} drinks {value}.",
        "{person} has a new habit and drinks {value} for breakfast.",
        ("What does {person} drink for breakfast?", "Which drink does {person} have in the morning these days?"),
        "Why is {value} still what {person} drinks for breakfast?",
    ),
    Relation(
        ("cello", "trumpet", "harp", "accordion", "oboe", "banjo", "flute", "tuba"),
        "{person} plays the {value}.",
        "{person} has given the old instrument away and plays the {value} now.",
        ("Which instrument does {person} play?", "What instrument is {person} playing these days?"),
        "Who taught {person} the {value} that {person} plays today?",
    ),
    Relation(
        ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
        "{person} has a dentist appointment on {value}.",
        "The dentist appointment of {person} was moved to {value}.",
        ("On which day is the dentist appointment of {person}?", "When does {person} see the dentist?"),
        "At what time on {value} does {person} see the dentist?",
    ),
    Relation(
        ("tractor", "scooter", "minivan", "motorbike", "pickup", "bicycle", "taxi", "tram"),
        "{person} goes to work by {value}.",
        "{person} goes to work by {value} from now on.",
        ("How does {person} go to work?", "What takes {person} to work these days?"),
        "Where does {person} leave the {value} on the way to work?",
    ),
    Relation(
        ("parrot", "tortoise", "ferret", "goat", "hamster", "donkey", "canary", "rabbit"),
        "The only pet of {person} is a {value}.",
        "{person} has found another home for the old pet, and has a {value} now.",
        ("What pet does {person} have?", "Which animal does {person} keep these days?"),
        "What is the name of the {value} that {person} keeps?",
    ),
    Relation(
        ("cellar", "attic", "garage", "kitchen", "pantry", "hallway", "greenhouse", "workshop"),
        "{person} keeps the spare key in the {value}.",
        "{person} has put the spare key elsewhere: it is in the {value} now.",
        ("Where is the spare key of {person}?", "In which room does {person} keep the spare key?"),
        "On which side of the {value} is the spare key of {person}?",
    ),
)

FILLERS = (
    "The weather has been mild all week.",
    "Somebody left an umbrella at the door.",
    "The bridge will be painted next spring.",
    "A new bus line opens in the autumn.",
    "The museum was crowded yesterday.",
    "There was thunder in the night.",
    "The neighbours are planning a party.",
    "The library closes early on holidays.",
    "The street lamps went out for an hour.",
    "An old film is shown at the cinema.",
    "The market sells good apples this year.",
    "The river is high after the rain.",
)
