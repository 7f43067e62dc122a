"""What people tell: facts about themselves, their kin and people they name, in sentences as they would say them.

A sentence is a template. ``{S}`` is the subject that begins it and ``{s}`` the same inside it ("My brother", "my
brother"), ``{o}`` its object ("me"), ``{P}`` and ``{p}`` are its possessives, ``{v}`` is the value, and ``[am|is]`` is
the verb for "I" and "you", then for everybody else.

Every fifth name and value is held out: the test alone has them. So are, of each relation, the sentences in ``new_``
fields, whose wording training lacks: they share no three words in a row (with "my brother" counted as one) with the
relation's own of training. All questions of the test are requests ("Remind me …", "Tell me …"); none of training is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from random import Random

HELD_OUT_EVERY = 5
# The share of values that are words, where words are given; of these, that with a piece behind it, and of two words.
WORDS, PIECED, PAIRED = 0.75, 0.2, 0.15
_VERB = re.compile(r"\[([^|\]]*)\|([^\]]*)\]")


def split(words: str, separator: str = "|") -> tuple[str, ...]:
    """The words of a list that is written as one string."""
    return tuple(word.strip() for word in words.replace("\n", " ").split(separator) if word.strip())


def part(values: tuple[str, ...], held_out: bool) -> tuple[str, ...]:
    """Those of ``values`` that are held out, or the others."""
    return tuple(value for i, value in enumerate(values) if (i % HELD_OUT_EVERY == 0) is held_out)


@dataclass(frozen=True)
class Relation:
    """One thing that can be said of somebody: its values, and the templates of its sentences.

    Attributes:
        values: what ``{v}`` can be.
        statements, updates, questions, answer: of training. An update overwrites an earlier value.
        new_statements, new_questions: of the test alone.
    """

    name: str
    values: tuple[str, ...]
    statements: tuple[str, ...]
    updates: tuple[str, ...]
    questions: tuple[str, ...]
    answer: str
    new_statements: tuple[str, ...]
    new_questions: tuple[str, ...]

    @property
    def trained(self) -> tuple[str, ...]:
        """All templates of training."""
        return *self.statements, *self.updates, *self.questions, self.answer


@dataclass(frozen=True)
class Subject:
    """Whom a fact is about: as the user says it, and as the answer does; each as subject and as possessive."""

    said: str
    said_of: str
    answered: str
    answered_of: str
    first_person: bool = False


ME = Subject("I", "my", "you", "your", first_person=True)


def named(name: str) -> Subject:
    """Somebody with a name."""
    return Subject(name, f"{name}'s", name, f"{name}'s")


def kin(who: str) -> Subject:
    """One of the user's people: "brother" is "my brother", and "your brother" in the answer."""
    return Subject(f"my {who}", f"my {who}'s", f"your {who}", f"your {who}'s")


@dataclass(frozen=True)
class Fact:
    """Somebody, a relation, and its value."""

    subject: Subject
    relation: Relation
    value: str

    @property
    def bare_value(self) -> str:
        """The value without an article: what an answer must name."""
        return self.value.removeprefix("a ").removeprefix("an ")

    def statement(self, random: Random, *, new: bool = False) -> str:
        """A sentence that states it; ``new``: in words that training lacks."""
        return self._say(random.choice(self.relation.new_statements if new else self.relation.statements))

    def update(self, random: Random) -> str:
        """A sentence that overwrites an earlier value."""
        return self._say(random.choice(self.relation.updates))

    def question(self, random: Random, *, new: bool = False) -> str:
        """A question for it; ``new``: in words, and of a kind, that training lacks."""
        return self._say(random.choice(self.relation.new_questions if new else self.relation.questions))

    def answer(self) -> str:
        """The sentence that answers it."""
        return self._say(self.relation.answer, answered=True)

    def _say(self, template: str, answered: bool = False) -> str:
        subject = self.subject
        who, of = (subject.answered, subject.answered_of) if answered else (subject.said, subject.said_of)
        text = _VERB.sub(lambda found: found[1 if subject.first_person else 2], template)
        text = text.format(S=_capital(who), s=who, o="me" if who == "I" else who, P=_capital(of), p=of, v=self.value)
        return _capital(text)


def place_of(value: str, text: str, begin: int, end: int) -> tuple[int, int]:
    """Where a value stands for the last time in a part of a text, as a word or words; its first letter and its end.

    Raises:
        ValueError: it does not.
    """
    found = [*re.finditer(rf"(?<!\w){re.escape(value)}(?!\w)", text[begin:end])]
    if not found:
        raise ValueError(f"value: {value!r} does not stand in {text[begin:end]!r}")
    return begin + found[-1].start(), begin + found[-1].end()


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


@dataclass(frozen=True)
class Words:
    """Words that can stand for a value: nonsense as a city or a pet, but what a memory must be able to pass on.

    A few hundred values are learnt by heart, each for itself; thousands are not, and what passes them on passes on
    values that training lacks.

    Attributes:
        lower, capital: of small letters, and with a capital one.
        pieces: that can stand behind one, so that a value of several tokens is passed on token by token.
        refused: what held-out values, sentences without their values, and names consist of, in small letters.
    """

    lower: tuple[str, ...]
    capital: tuple[str, ...]
    pieces: tuple[str, ...] = ()
    refused: frozenset[str] = frozenset()

    @classmethod
    def of(cls, tokenizer, most: int = 4000) -> Words:
        """The ``most`` frequent of each kind that are one token behind a space, but for those that are ``refused``."""
        every = [value for relation in RELATIONS for value in part(relation.values, held_out=True)]
        refused = {word.lower() for text in (*every, *NAMES) for word in text.split()}
        # A value that is a word of its own sentence has no place of its own in it.
        sentences = [text for relation in RELATIONS for text in relation.trained]
        refused = frozenset(refused | set(re.findall(r"[a-z]+", " ".join(sentences + list(KIN)).lower())))
        # Byte-pair merges come in the order of their frequency, and their ids with them.
        tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
        words = [token[1:] for token, _ in tokens if re.fullmatch(r"Ġ[A-Za-z][a-z]{2,}", token)]
        words = [word for word in words if word.lower() not in refused]
        lower, capital = ([w for w in words if w.islower() is small][:most] for small in (True, False))
        pieces = [token for token, _ in tokens if re.fullmatch(r"[a-z]{2,6}", token)][:most]
        return cls(tuple(lower), tuple(capital), tuple(pieces), refused)

    def instead_of(self, value: str, random: Random) -> str:
        """A word of the kind of ``value``: with an article, or a capital letter; numbers and dates stay."""
        if any(letter.isdigit() for letter in value) or value in (*DAYS, *TIMES):
            return value
        if value.startswith(("a ", "an ")):
            word = self._one(self.lower, random)
            return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"
        return self._one(self.capital if value[0].isupper() else self.lower, random)

    def _one(self, words: tuple[str, ...], random: Random) -> str:
        """One of the words; one with a piece behind it, and one of two words, now and then."""
        word, draw = random.choice(words), random.random()
        if self.pieces and draw < PIECED:
            longer = word + random.choice(self.pieces)
            return word if longer.lower() in self.refused else longer
        return f"{word} {random.choice(words)}" if draw > 1 - PAIRED else word


def draw_facts(
    random: Random, count: int, *, held_out: bool, known_values: bool = False, words: Words | None = None
) -> list[Fact]:
    """``count`` facts, no two of one subject and relation; in a third of the draws few relations, many subjects.

    Args:
        known_values: the values are those of training all the same.
        words: most of the values are of these.
    """
    relations = list(RELATIONS)
    if random.random() < 1 / 3:
        relations = random.sample(relations, min(len(relations), max(2, count // 2)))
    names = random.sample(part(NAMES, held_out), min(4, 1 + count))
    people = [*map(named, names), *map(kin, random.sample(KIN, 2))]
    facts: list[Fact] = []
    taken: set[tuple[str, str]] = set()
    while len(facts) < count:
        subject = ME if random.random() < 0.35 else random.choice(people)
        relation = random.choice(relations)
        key = (subject.said, relation.name)
        if key not in taken:
            taken.add(key)
            values = part(relation.values, held_out and not known_values)
            value = random.choice([value for value in values if value != subject.said])
            if words is not None and random.random() < WORDS:
                value = words.instead_of(value, random)
            facts.append(Fact(subject, relation, value))
        elif len(taken) >= len(relations) * (1 + len(people)):
            relations = list(RELATIONS)
    return facts


def changed(random: Random, fact: Fact, *, held_out: bool) -> Fact:
    """The same of the same person with another value."""
    values = [value for value in part(fact.relation.values, held_out) if value not in (fact.value, fact.subject.said)]
    return Fact(fact.subject, fact.relation, random.choice(values))


NAMES = split(
    """Anna|Ben|Clara|David|Emma|Felix|Grace|Henry|Isla|Jack|Kate|Leo|Maria|Noah|Olivia|Paul|Rosa|Sam|Tara|Victor
    |Wendy|Yusuf|Zoe|Alice|Boris|Chloe|Diego|Elena|Frank|Greta|Hugo|Ivy|Jonas|Karen|Lucas|Mia|Nora|Oscar|Petra|Quinn
    |Robert|Sofia|Thomas|Ursula|Vera|Walter|Xenia|Adam|Bella|Carlos|Diana|Erik|Fiona|George|Hannah|Igor|Julia|Kevin
    |Laura|Martin|Nina|Omar|Peter|Rachel|Simon|Tina|Una|Vincent|William|Amy|Bruno|Cora|Daniel|Eva|Fred|Gina|Harold|Irene
    |James|Kim|Linda|Max|Nadia|Oliver|Paula|Ralph|Sarah|Tom|Violet|Will|Ada|Brian|Carmen|Dennis|Ella|Fatima|Gary|Helen
    |Ian|Judy|Karl|Lily|Marcus|Naomi|Otto|Pia|Ruth|Stefan|Tessa|Uma|Viktor|Wanda"""
)
KIN = split("brother|sister|mother|father|boss|neighbour|cousin|aunt|uncle|friend|colleague|grandmother")

CITIES = split(
    """Paris|London|Berlin|Madrid|Rome|Vienna|Oslo|Prague|Dublin|Lisbon|Athens|Warsaw|Budapest|Tokyo|Boston|Chicago
    |Seattle|Denver|Dallas|Toronto|Sydney|Moscow|Cairo|Delhi|Mumbai|Bangkok|Singapore|Amsterdam|Brussels|Zurich|Geneva
    |Hamburg|Munich|Barcelona|Milan|Venice|Florence|Naples|Helsinki|Stockholm|Copenhagen|Edinburgh|Glasgow|Manchester
    |Montreal|Vancouver|Houston|Portland|Miami|Nairobi|Lima|Havana|Santiago|Istanbul|Dubai"""
)
COUNTRIES = split(
    """Spain|Italy|Greece|Portugal|Norway|Sweden|Japan|China|India|Brazil|Mexico|Canada|Egypt|Kenya|Morocco|Turkey
    |Iceland|Ireland|Scotland|France|Germany|Austria|Switzerland|Poland|Croatia|Thailand|Vietnam|Australia|Peru|Chile
    |Argentina|Cuba|Jamaica|Nepal|Indonesia|Denmark|Finland|Hungary|Romania|Russia"""
)
JOBS = split(
    """a nurse|a teacher|a lawyer|a baker|a farmer|a pilot|a chef|a dentist|a carpenter|a plumber|a painter|a writer
    |a journalist|a photographer|a librarian|a mechanic|a gardener|a tailor|a barber|a waiter|a surgeon|a pharmacist
    |a biologist|a chemist|a translator|a musician|a dancer|a firefighter|a judge|a banker|a cashier|a driver|a sailor
    |a soldier|a butcher|a fisherman|a programmer|a designer|a geologist|a secretary|an architect|an engineer
    |an accountant|an actor|an electrician"""
)
PETS = split(
    """a cat|a dog|a parrot|a rabbit|a hamster|a turtle|a snake|a goldfish|a horse|a pony|a goat|a sheep|a chicken
    |a duck|a goose|a lizard|a frog|a mouse|a rat|a spider|a pig|a donkey|a pigeon|a peacock|a fox|a monkey|a llama
    |a camel|a crow|an owl"""
)
PET_NAMES = split(
    """Biscuit|Pepper|Shadow|Ginger|Lucky|Rocky|Buddy|Daisy|Coco|Oreo|Simba|Tiger|Bandit|Cookie|Honey|Maple|Misty|Pumpkin
    |Rusty|Smokey|Snowball|Sunny|Whiskers|Ziggy|Bubbles|Cinnamon|Domino|Freckles|Hazel|Jasper|Marble|Muffin|Nugget
    |Patches|Peanut|Pickles|Socks|Spot|Toffee|Waffles"""
)
FOODS = split(
    """pizza|sushi|pasta|rice|curry|soup|salad|pancakes|waffles|dumplings|tacos|burritos|lasagna|risotto|noodles|steak
    |salmon|shrimp|lobster|bread|cheese|chocolate|ice cream|apple pie|cheesecake|mushrooms|potatoes|tomatoes|spinach
    |broccoli|carrots|pumpkin|avocado|mangoes|strawberries|cherries|bananas|peaches|oranges|grapes"""
)
DRINKS = split(
    """coffee|green tea|black tea|milk|orange juice|apple juice|lemonade|water|hot chocolate|red wine|white wine|beer
    |cider|champagne|whiskey|tomato juice|ginger ale|soda|mint tea|cocoa"""
)
COLORS = split(
    """red|blue|green|yellow|purple|orange|pink|black|white|brown|gray|silver|gold|turquoise|violet|crimson|navy|olive
    |beige|maroon"""
)
MONTHS = split("January|February|March|April|May|June|July|August|September|October|November|December")
DATES = tuple(
    f"{month} {day}" for day in (3, 8, 12, 17, 21, 26, 30) for month in MONTHS if (month, day) != ("February", 30)
)
CARS = split(
    """a Toyota|a Volvo|a Ford|a Honda|a Tesla|a Fiat|a Jeep|a Porsche|a Renault|a Mazda|a Nissan|a Subaru|a Skoda|a Kia
    |a Lexus|a Peugeot|a Bentley|a Ferrari|a BMW|a Mercedes|a van|a truck|a motorcycle|a scooter|an Audi"""
)
HOBBIES = split(
    """painting|swimming|hiking|fishing|knitting|chess|gardening|photography|cycling|running|dancing|singing|cooking
    |baking|sewing|climbing|surfing|skiing|sailing|archery|tennis|golf|football|basketball|volleyball|yoga|boxing
    |fencing|juggling|pottery|woodworking|calligraphy|astronomy|birdwatching|camping|bowling|karate|badminton|rowing
    |skating"""
)
INSTRUMENTS = split(
    """piano|violin|guitar|cello|flute|trumpet|bagpipes|harp|clarinet|saxophone|trombone|banjo|ukulele|accordion|organ
    |oboe|tuba|mandolin|harmonica|viola"""
)
LANGUAGES = split(
    """Spanish|French|German|Italian|Portuguese|Russian|Chinese|Japanese|Korean|Arabic|Hindi|Turkish|Greek|Polish|Dutch
    |Swedish|Norwegian|Danish|Finnish|Hungarian|Czech|Hebrew|Persian|Thai|Vietnamese|Swahili|Latin|Irish|Welsh
    |Ukrainian"""
)
ALLERGIES = split(
    """peanuts|eggs|wheat|soy|shellfish|pollen|dust|bees|wool|latex|penicillin|aspirin|walnuts|almonds|sesame|mustard
    |celery|garlic|kiwi|gluten"""
)
PLACES = split(
    """kitchen|garage|garden|cellar|attic|bathroom|bedroom|office|hallway|drawer|closet|basement|balcony|car|mailbox
    |library|fridge|toolbox|backpack|suitcase|desk|shed|laundry room|living room|glove box"""
)
DAYS = split("Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday")
TIMES = split(
    """seven|eight|nine|ten|eleven|noon|half past one|half past two|half past three|half past four|half past five
    |half past six|half past seven|half past eight|half past nine|half past ten|two|three|four|five|six|midnight"""
)
NUMBERS = tuple(str(number) for number in range(11, 99))
THINGS = split(
    """a telescope|a laptop|a bicycle|a tent|a camera|a sofa|a guitar|a microscope|a lamp|a carpet|a printer|a watch
    |a necklace|a ring|a mirror|a bookshelf|a kayak|a drone|a tablet|a blender|a sewing machine|a fountain pen|a globe
    |a clock|a vase|a suitcase|a hammock|a grill|a jacket|a hat|a scarf|a mattress|a heater|a fan|an umbrella"""
)

RELATIONS = (
    Relation(
        "city", CITIES,
        ("{S} [live|lives] in {v}.", "{P} home is in {v}.", "{S} [have|has] a flat in {v}.",
         "{S} [am|is] based in {v}.", "In {v} {s} [have|has] found a home.", "{S} settled down in {v} years ago.",
         "{P} apartment in {v} is small but cosy.", "For work {s} moved to {v}, and stayed."),
        ("{S} moved to {v} last week.", "{S} [have|has] just moved to {v}."),
        ("Where [do|does] {s} live?", "Which city [do|does] {s} live in?", "What city [am|is] {s} based in?",
         "Do you know where {s} [live|lives]?", "In which city is {p} home?", "Where is {p} flat?",
         "What town [do|does] {s} call home?"),
        "{S} [live|lives] in {v}.",
        ("{S} [rent|rents] a small place in {v}.", "The city of {v} is home to {o}."),
        ("Remind me of {p} city of residence.", "Tell me which town {p} home stands in."),
    ),
    Relation(
        "birthplace", CITIES,
        ("{S} was born in {v}.", "{S} [come|comes] from {v}.", "{P} birthplace is {v}.", "{S} grew up in {v}.",
         "In {v} {s} was born.", "As a baby {s} lived in {v}.", "{P} family is from {v}.",
         "The hospital of {v} is where {s} was born."),
        ("I was wrong, {s} was born in {v}.", "No, {p} birthplace is {v}."),
        ("Where was {s} born?", "Where [do|does] {s} come from?", "What is {p} birthplace?",
         "Do you know where {s} was born?", "In what city was {s} born?", "Where did {s} grow up?",
         "Where is {p} family from?"),
        "{S} [were|was] born in {v}.",
        ("{S} first saw the light of day in {v}.", "{P} childhood was spent in {v}."),
        ("Remind me of {p} native town.", "Tell me {p} place of birth."),
    ),
    Relation(
        "job", JOBS,
        ("{S} [work|works] as {v}.", "{S} [am|is] {v}.", "{P} trade is that of {v}.",
         "{S} [earn|earns] a living as {v}.", "{S} found work as {v}.", "{S} trained to be {v}, and that is {p} job.",
         "{S} got hired as {v}.", "In {p} work as {v}, {s} [meet|meets] many people."),
        ("{S} [work|works] as {v} now.", "{S} changed jobs and [am|is] {v} now."),
        ("What [do|does] {s} do for a living?", "What is {p} job?", "What [do|does] {s} work as?",
         "Do you know what {p} job is?", "What kind of work [do|does] {s} do?", "How [do|does] {s} earn a living?",
         "What is {p} occupation?"),
        "{S} [work|works] as {v}.",
        ("By profession {s} [am|is] {v}.", "{S} [have|has] been {v} for years."),
        ("Remind me of {p} profession.", "Tell me what {s} [get|gets] paid to do."),
    ),
    Relation(
        "pet", PETS,
        ("{S} [have|has] {v} at home.", "{P} pet is {v}.", "{S} [keep|keeps] {v}.", "{S} [own|owns] {v}.",
         "There is {v} living with {o}.", "{S} adopted {v}.", "{S} [look|looks] after {v} every day.",
         "{S} [feed|feeds] {v} each morning."),
        ("{S} [have|has] {v} instead now.", "{P} pet is {v} now."),
        ("What pet [do|does] {s} have?", "Which animal [do|does] {s} keep?", "What animal is {p} pet?",
         "Do you know what pet {s} [have|has]?", "What kind of animal lives with {o}?", "What animal did {s} adopt?",
         "Which pet [do|does] {s} own?"),
        "{S} [have|has] {v}.",
        ("The animal in {p} house is {v}.", "{S} [share|shares] the house with {v}."),
        ("Remind me of the species of {p} pet.", "Tell me the kind of pet at {p} place."),
    ),
    Relation(
        "pet name", PET_NAMES,
        ("{P} dog is called {v}.", "{P} dog's name is {v}.", "{S} named the dog {v}.",
         "{S} [have|has] a dog called {v}.", "Everybody knows {v}, {p} dog.", "{P} puppy goes by the name of {v}.",
         "{S} [take|takes] the dog, {v}, for a walk.", "The dog {v} belongs to {o}."),
        ("{P} new dog is called {v}.", "{S} renamed the dog {v}."),
        ("What is {p} dog called?", "What is the name of {p} dog?", "What name did {s} give the dog?",
         "Do you know what {p} dog is called?", "What name did {s} choose for the dog?",
         "Which name does {p} dog have?", "By what name does {p} puppy go?"),
        "{P} dog is called {v}.",
        ("The dog at {p} place answers to {v}.", "Shout {v}, and {p} dog comes running."),
        ("Remind me of the name on {p} dog's collar.", "Tell me what {s} [call|calls] the dog."),
    ),
    Relation(
        "food", FOODS,
        ("{P} favourite food is {v}.", "{S} [love|loves] {v}.", "{S} [like|likes] {v} best.",
         "{S} could eat {v} every day.", "When hungry, {s} [want|wants] {v}.", "With {v}, {s} [am|is] always happy.",
         "{S} cannot resist {v}.", "For dinner {s} [choose|chooses] {v} whenever possible."),
        ("{P} favourite food is {v} now.", "Lately {s} [prefer|prefers] {v}."),
        ("What is {p} favourite food?", "What food [do|does] {s} like best?", "What [do|does] {s} love to eat?",
         "Do you know what {s} [like|likes] to eat?", "Which food is {p} favourite?",
         "What [do|does] {s} want for dinner?", "What would {s} eat every day?"),
        "{P} favourite food is {v}.",
        ("Nothing tastes better to {o} than {v}.", "{P} dish of choice is {v}."),
        ("Remind me which dish {s} [enjoy|enjoys] most.", "Tell me {p} favourite dish."),
    ),
    Relation(
        "drink", DRINKS,
        ("{P} favourite drink is {v}.", "{S} always [order|orders] {v}.", "{S} [drink|drinks] {v} every day.",
         "{S} usually [drink|drinks] {v}.", "When thirsty, {s} [reach|reaches] for {v}.",
         "With meals {s} [have|has] {v}.", "{S} cannot start the day without {v}.", "At breakfast {s} [have|has] {v}."),
        ("{P} favourite drink is {v} now.", "{S} [drink|drinks] {v} these days."),
        ("What is {p} favourite drink?", "What [do|does] {s} usually drink?", "What drink [do|does] {s} order?",
         "Do you know what {s} [drink|drinks]?", "Which drink is {p} favourite?",
         "What [do|does] {s} have at breakfast?", "What [do|does] {s} drink every day?"),
        "{P} favourite drink is {v}.",
        ("In a bar {s} [ask|asks] for {v}.", "{P} glass is usually filled with {v}."),
        ("Remind me of {p} usual beverage.", "Tell me which drink {s} [prefer|prefers]."),
    ),
    Relation(
        "color", COLORS,
        ("{P} favourite color is {v}.", "{S} [like|likes] the color {v} best.", "{S} painted the house {v}.",
         "{S} [wear|wears] only {v}.", "{P} room is painted {v}, just as {s} [like|likes] it.",
         "It must be {v}: that is {p} color.", "{S} chose {v} for the walls.",
         "If it comes in {v}, {s} [buy|buys] it."),
        ("{P} favourite color is {v} now.", "{S} [like|likes] {v} better now."),
        ("What is {p} favourite color?", "Which color [do|does] {s} like best?", "What color [do|does] {s} like?",
         "Do you know {p} favourite color?", "What color did {s} choose?", "Which color [do|does] {s} wear?",
         "What is the color {s} [like|likes] most?"),
        "{P} favourite color is {v}.",
        ("Of all colors {s} [prefer|prefers] {v}.", "No color pleases {o} more than {v}."),
        ("Remind me which color {s} [prefer|prefers].", "Tell me the color that {s} [love|loves]."),
    ),
    Relation(
        "birthday", DATES,
        ("{P} birthday is on {v}.", "{S} was born on {v}.", "Every year {s} [celebrate|celebrates] on {v}.",
         "{P} birthday falls on {v}.", "It was on {v} that {s} was born.",
         "{P} party is on {v}, on the birthday itself.", "{S} [have|has] a birthday on {v}.",
         "The date of {p} birth is {v}."),
        ("No, {p} birthday is on {v}.", "I got it wrong, {p} birthday is {v}."),
        ("When is {p} birthday?", "What date is {p} birthday?", "On which day is {p} birthday?",
         "Do you know when {p} birthday is?", "When was {s} born?", "When [do|does] {s} celebrate?",
         "What is the date of {p} birth?"),
        "{P} birthday is on {v}.",
        ("On {v} {s} [turn|turns] a year older.", "{P} cake and candles come on {v}."),
        ("Remind me of {p} birthday.", "Tell me on what date to wish {o} a happy birthday."),
    ),
    Relation(
        "car", CARS,
        ("{S} [drive|drives] {v}.", "The vehicle {s} [own|owns] is {v}.", "{P} vehicle is {v}.",
         "{S} [use|uses] {v} to get to work.", "{S} got behind the wheel of {v}.", "{P} new vehicle is {v}.",
         "Each morning {s} [start|starts] {v} and [leave|leaves].", "{S} [get|gets] everywhere with {v}."),
        ("{S} bought {v} and [drive|drives] it now.", "{S} [drive|drives] {v} now."),
        ("What [do|does] {s} drive?", "What vehicle [do|does] {s} have?", "Which car [do|does] {s} drive?",
         "Do you know what {s} [drive|drives]?", "What kind of car is {p} vehicle?", "What car [do|does] {s} own?",
         "What [do|does] {s} use to get to work?"),
        "{S} [drive|drives] {v}.",
        ("In {p} garage stands {v}.", "{S} [park|parks] {v} in front of the house."),
        ("Remind me of {p} car.", "Tell me which vehicle {s} [use|uses]."),
    ),
    Relation(
        "hobby", HOBBIES,
        ("{P} hobby is {v}.", "{S} [spend|spends] weekends on {v}.", "{S} [enjoy|enjoys] {v}.",
         "{S} [am|is] really into {v}.", "It is {v} that {s} [do|does] to relax.",
         "On Sundays it is {v} for {o}.", "{S} started with {v} as a child.",
         "What {s} [like|likes] doing is {v}."),
        ("{P} new hobby is {v}.", "{S} took up {v} instead."),
        ("What is {p} hobby?", "What [do|does] {s} do at weekends?", "What [do|does] {s} enjoy doing?",
         "Do you know {p} hobby?", "How [do|does] {s} relax?", "What [am|is] {s} really into?",
         "How [do|does] {s} spend weekends?"),
        "{P} hobby is {v}.",
        ("After work {s} [have|has] only {v} in mind.", "{P} free time belongs to {v}."),
        ("Remind me of {p} leisure activity.", "Tell me about {p} pastime."),
    ),
    Relation(
        "instrument", INSTRUMENTS,
        ("{S} [play|plays] the {v}.", "{P} instrument is the {v}.", "{S} [practise|practises] the {v} every day.",
         "{S} [take|takes] lessons on the {v}.", "The {v} is what {s} [play|plays].",
         "{S} learned the {v} at school.", "{S} bought the {v} second-hand and [play|plays] well.",
         "{S} gave a concert on the {v}."),
        ("{S} [play|plays] the {v} now.", "{S} switched to the {v}."),
        ("What instrument [do|does] {s} play?", "Which instrument [do|does] {s} practise?", "What is {p} instrument?",
         "Do you know what instrument {s} [play|plays]?", "On which instrument [do|does] {s} take lessons?",
         "What instrument did {s} learn?", "What [do|does] {s} play?"),
        "{S} [play|plays] the {v}.",
        ("In the orchestra {s} [am|is] the one with the {v}.", "You can hear {o} on the {v}."),
        ("Remind me of {p} musical instrument.", "Tell me the instrument {s} [perform|performs] on."),
    ),
    Relation(
        "language", LANGUAGES,
        ("{S} [am|is] learning {v}.", "{S} [study|studies] {v}.", "{S} [take|takes] {v} lessons.",
         "{S} [speak|speaks] {v}.", "At school {s} [take|takes] {v}.", "Every evening {s} [practise|practises] {v}.",
         "{S} can hold a conversation in {v}.", "{P} teacher speaks {v} with {o}."),
        ("{S} [am|is] learning {v} now.", "{S} switched to learning {v}."),
        ("What language [am|is] {s} learning?", "Which language [do|does] {s} study?",
         "What language [do|does] {s} speak?", "Do you know what language {s} [am|is] learning?",
         "Which language [do|does] {s} practise?", "What [am|is] {s} studying?",
         "In what language [do|does] {s} take lessons?"),
        "{S} [are|is] learning {v}.",
        ("{P} language course is in {v}.", "{S} [read|reads] books in {v}."),
        ("Remind me which foreign tongue {s} [know|knows].", "Tell me {p} new language."),
    ),
    Relation(
        "allergy", ALLERGIES,
        ("{S} [am|is] allergic to {v}.", "{S} [have|has] an allergy to {v}.", "{S} must avoid {v}.",
         "{P} allergy is {v}.", "{S} cannot have any {v} because of an allergy.",
         "The allergy {s} [have|has] is to {v}.", "Because of an allergy {s} cannot eat or touch {v}.",
         "{S} [react|reacts] badly to {v}."),
        ("It turned out that {s} [am|is] allergic to {v}.", "The doctor says {s} [am|is] allergic to {v}."),
        ("What [am|is] {s} allergic to?", "Which allergy [do|does] {s} have?", "What must {s} avoid?",
         "Do you know what {s} [am|is] allergic to?", "What is {p} allergy?", "What [do|does] {s} react badly to?",
         "To what [do|does] {s} have an allergy?"),
        "{S} [are|is] allergic to {v}.",
        ("{S} [get|gets] a rash from {v}.", "Contact with {v} makes {o} ill."),
        ("Remind me of {p} allergy.", "Tell me what {s} cannot tolerate for health reasons."),
    ),
    Relation(
        "keys", PLACES,
        ("{S} left the keys in the {v}.", "{P} keys are in the {v}.", "{S} [keep|keeps] the keys in the {v}.",
         "{S} put the keys in the {v}.", "The {v} is where {p} keys are.", "{P} keys were last seen in the {v}.",
         "{S} forgot the keys in the {v}.", "If you need {p} keys, they lie in the {v}."),
        ("{S} moved the keys to the {v}.", "{P} keys are in the {v} now."),
        ("Where are {p} keys?", "Where did {s} leave the keys?", "Where did {s} put the keys?",
         "Do you know where {p} keys are?", "In what place are {p} keys?", "Where [do|does] {s} keep the keys?",
         "Where were {p} keys last seen?"),
        "{P} keys are in the {v}.",
        ("The {v} holds {p} keys.", "Search the {v} and you will find {p} keys."),
        ("Remind me of the spot with {p} keys.", "Tell me where to look for {p} keys."),
    ),
    Relation(
        "meeting", DAYS,
        ("{P} meeting is on {v}.", "{S} [have|has] a meeting on {v}.", "{P} appointment is on {v}.",
         "{S} [see|sees] the doctor on {v}.", "On {v} {s} [have|has] to be at a meeting.",
         "When {v} comes, {s} [have|has] a meeting.", "They invited {o} to a meeting on {v}.",
         "{S} [meet|meets] the team on {v}."),
        ("{P} meeting was moved to {v}.", "{P} meeting is on {v} now."),
        ("When is {p} meeting?", "Which day is {p} meeting?", "On what day [do|does] {s} have an appointment?",
         "Do you know when {p} meeting is?", "On which day is {p} meeting?", "What day is {p} appointment?",
         "When [do|does] {s} have a meeting?"),
        "{P} meeting is on {v}.",
        ("{P} calendar keeps {v} free for the meeting.", "{S} [am|is] expected at the meeting on {v}."),
        ("Remind me of the day of {p} meeting.", "Tell me the weekday of {p} meeting."),
    ),
    Relation(
        "train", TIMES,
        ("{P} train leaves at {v}.", "{S} [take|takes] the train at {v}.", "{P} bus goes at {v}.",
         "{S} [have|has] to leave at {v}.", "At {v} {p} train departs.", "{P} train is the one at {v}.",
         "{S} booked the train that leaves at {v}.", "{S} will catch the bus at {v}."),
        ("{P} train leaves at {v} now.", "The time changed: {p} train leaves at {v}."),
        ("When does {p} train leave?", "At what time [do|does] {s} have to leave?", "What time is {p} train?",
         "Do you know when {p} train leaves?", "At what time is {p} train?", "When does {p} bus go?",
         "What time [do|does] {s} have to leave?"),
        "{P} train leaves at {v}.",
        ("{S} must be at the station at {v}.", "{P} train ticket says {v}."),
        ("Remind me of {p} time of departure.", "Tell me the time of {p} train."),
    ),
    Relation(
        "room", NUMBERS,
        ("{P} room number is {v}.", "{S} [stay|stays] in room {v}.", "{S} [have|has] room {v}.",
         "{P} room is number {v}.", "Room {v} is where {s} [sleep|sleeps].", "At the hotel they gave {o} room {v}.",
         "{S} got the key of room {v}.", "The number of {p} room is {v}."),
        ("{S} moved to room {v}.", "{P} room number is {v} now."),
        ("What is {p} room number?", "Which room [do|does] {s} have?", "What room [am|is] {s} in?",
         "Do you know {p} room number?", "In which room [do|does] {s} stay?", "What number is {p} room?",
         "What is the number of {p} room?"),
        "{P} room number is {v}.",
        ("You can knock for {o} at the door of room {v}.", "{P} door has the number {v}."),
        ("Remind me which hotel door {p} key opens.", "Tell me the number on {p} door."),
    ),
    Relation(
        "age", NUMBERS,
        ("{S} [am|is] {v} years old.", "{P} age is {v}.", "{S} just turned {v}.", "{S} [am|is] {v}.",
         "It is {v} years since {s} was born.", "At the age of {v}, {s} [feel|feels] fine.",
         "{S} reached the age of {v}.", "Last week {s} became {v} years old."),
        ("{S} [am|is] {v} years old now.", "No, {s} [am|is] {v} years old."),
        ("How old [am|is] {s}?", "What is {p} age?", "How many years old [am|is] {s}?",
         "Do you know how old {s} [am|is]?", "What age [am|is] {s}?", "What age did {s} reach?",
         "How many years [have|has] {s} lived?"),
        "{S} [are|is] {v} years old.",
        ("There were {v} candles on {p} cake.", "{S} came into the world {v} years ago."),
        ("Remind me how many candles {p} cake needs.", "Tell me {p} age."),
    ),
    Relation(
        "holiday", COUNTRIES,
        ("{S} [am|is] going to {v} in summer.", "{S} [plan|plans] a trip to {v}.", "{P} next holiday is in {v}.",
         "{S} booked a flight to {v}.", "It is {v} that {s} [visit|visits] on holiday.",
         "{S} [want|wants] to see {v} this year.", "{P} vacation will be in {v}.",
         "In August {s} [fly|flies] to {v}."),
        ("{P} plans changed: {s} [am|is] going to {v}.", "{S} [am|is] going to {v} instead."),
        ("Where [am|is] {s} going on holiday?", "Which country [do|does] {s} plan to visit?",
         "Where is {p} next holiday?", "Do you know where {s} [am|is] going on holiday?",
         "What country [am|is] {s} going to?", "Where will {p} vacation be?",
         "To which country did {s} book a flight?"),
        "{S} [are|is] going to {v}.",
        ("{P} suitcase is packed for {v}.", "{S} will spend the summer in {v}."),
        ("Remind me where {p} next trip goes.", "Tell me {p} holiday destination."),
    ),
    Relation(
        "purchase", THINGS,
        ("{S} bought {v}.", "{S} got {v} as a present.", "{P} new possession is {v}.", "{S} ordered {v}.",
         "{S} treated the family to {v}.", "Yesterday {s} paid for {v}.", "{S} picked up {v} at the market.",
         "They gave {o} {v}."),
        ("{S} returned it and bought {v}.", "{S} exchanged it for {v}."),
        ("What did {s} buy?", "What did {s} get?", "What new thing [do|does] {s} have?",
         "Do you know what {s} bought?", "What did {s} order?", "What did {s} pay for?",
         "What is {p} new possession?"),
        "{S} bought {v}.",
        ("{S} came home from the shop with {v}.", "{P} money went into {v}."),
        ("Remind me of {p} last purchase.", "Tell me about the thing {s} spent money on."),
    ),
    Relation(
        "partner", NAMES,
        ("{P} partner is called {v}.", "{S} [am|is] married to {v}.", "{P} partner's name is {v}.",
         "{S} [live|lives] together with {v}.", "It is {v} that {s} [am|is] married to.",
         "{S} met {v} and got married.", "Since May {s} [am|is] together with {v}.",
         "{P} wedding to {v} was last year."),
        ("{P} new partner is called {v}.", "{S} [am|is] with {v} now."),
        ("What is {p} partner called?", "Who [am|is] {s} married to?", "What is the name of {p} partner?",
         "Do you know who {p} partner is?", "What is the name of the person {s} [live|lives] with?",
         "Who did {s} marry?", "Who is {p} partner?"),
        "{P} partner is called {v}.",
        ("{S} exchanged rings with {v}.", "The love of {p} life is {v}."),
        ("Remind me of {p} spouse.", "Tell me whom {s} [love|loves]."),
    ),
)  # fmt: skip
