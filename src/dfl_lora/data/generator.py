"""Labelled English sentences from a small grammar: data for demonstrations and tests that needs no download.

A sentence is an opinion on one domain (films, meals, ...); its label is 1 when the opinion is good, 0 when it is bad:

    clause    subject + verb + adjective; "not", "hardly", "far from", ... turn the adjective into its opposite
    plain     a clause, perhaps inside a report ("most people said that ...", keeps the label) or inside a denial
              ("nobody could claim that ...", turns it)
    contrast  two clauses of opposite labels, where the main clause decides: "although WEAK, MAIN", "MAIN, even if WEAK"
    addition  two clauses of the same label
    fact      a neutral remark before or behind any of these

The label follows from the derivation, so a perfect reader scores 1.0 and a guess 0.5. Single words carry only part
of it: negations, denials and contrasts have to be read in order, which is what a language model is there to learn.
The hash of a sentence decides its split, so that no two splits ever share one, whatever the seeds.

A pair is a premise, one clause and perhaps a fact, and a hypothesis, a clause whose label is that of MNLI:
0 (entailment) on the same subject with the same meaning, 1 (neutral) on another subject, 2 (contradiction) on the
same subject with the opposite meaning. The hash of the premise decides its split.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

from dfl_lora.data.places import BUILTIN_ROWS
from dfl_lora.errors import UserError
from dfl_lora.streams import numpy_stream


@dataclass(frozen=True)
class Domain:
    """What an opinion can be about: subjects with their form of "to be", adjectives by label, neutral facts."""

    name: str
    subjects: tuple[str, ...]
    adjectives: tuple[tuple[str, ...], tuple[str, ...]]
    facts: tuple[str, ...]


SPLITS = ("train", "validation")
NUM_WORDS = range(6, 31)
PLAIN, CONTRAST, REMARKED = 0.55, 0.2, 0.5  # shares of all sentences
DENIED, REPORTED = 0.08, 0.4  # shares of plain sentences, and of those of them that are not denied
NEGATED, INTENSE, SHARED = 0.1, 0.3, 0.3  # shares of clauses: negated, intensified, with an adjective for any domain

# fmt: off
PRAISE = ("wonderful", "superb", "excellent", "outstanding", "impressive", "fantastic", "marvellous", "terrific",
          "splendid", "first-rate", "delightful", "great")
BLAME = ("dreadful", "awful", "terrible", "disappointing", "mediocre", "lousy", "abysmal", "second-rate",
         "atrocious", "underwhelming", "pathetic", "poor")
AFFIRMATIONS = ("{be}", "{be}", "{be}", "seemed", "proved", "turned out to be", "came across as")
NEGATIONS = ("{be} not", "{be} not", "{be} hardly", "{be} far from", "{be} anything but", "{be} by no means",
             "{be} not at all", "did not seem", "hardly seemed", "never seemed", "proved far from")
INTENSIFIERS = ("really", "truly", "genuinely", "thoroughly", "simply")
REPORTS = ("I thought that", "my sister found that", "everyone agreed that", "in my opinion,", "most people said that",
           "my neighbours told us that", "as far as I could tell,", "my cousin wrote that")
DENIALS = ("nobody could claim that", "I cannot agree that", "it is simply not true that", "few people would say that",
           "I would never say that", "it would be wrong to say that")
CONTRASTS = ("although {weak}, {main}", "even though {weak}, {main}", "while {weak}, {main}",
             "despite the fact that {weak}, {main}", "{weak}, but {main}", "{weak}, yet {main}",
             "it is true that {weak}, but {main}", "{main}, although {weak}", "{main}, even though {weak}",
             "{main}, even if {weak}", "{main}, despite the fact that {weak}")
ADDITIONS = ("{main}, and {also}", "{main}, and likewise {also}", "{main}, and on top of that {also}")
REMARKS = ("{fact}; {core}", "for the record, {fact}; {core}", "{core}; {fact}", "{core}; by the way, {fact}")

DOMAINS = (
    Domain("films", ("the plot was", "the dialogue was", "the acting was", "the ending was", "the performances were"),
           (("tedious", "lifeless", "dull", "contrived", "unconvincing", "boring", "forced"),
            ("gripping", "moving", "convincing", "captivating", "riveting", "compelling", "touching")),
           ("we saw the film on a Tuesday evening", "the film runs for just over two hours",
            "the cinema is next to the station", "the director grew up in Canada", "the trailer came out in March")),
    Domain("meals", ("the soup was", "the main course was", "the dessert was", "the bread was", "the dumplings were"),
           (("bland", "tasteless", "inedible", "unappetising", "revolting", "disgusting", "insipid"),
            ("delicious", "tasty", "appetising", "flavourful", "mouth-watering", "scrumptious", "heavenly")),
           ("we had a table by the window", "the restaurant is on the second floor", "six of us ate there on Friday",
            "the menu changes every month", "lunch is served until three")),
    Domain("hotels", ("the room was", "the lobby was", "the bathroom was", "the lounge was", "the suites were"),
           (("filthy", "shabby", "grimy", "dingy", "squalid", "uninviting", "run-down"),
            ("comfortable", "spotless", "welcoming", "cosy", "inviting", "immaculate", "charming")),
           ("we stayed for three nights", "the hotel has forty rooms", "breakfast starts at seven",
            "the building dates from the sixties", "the airport bus stops across the street")),
    Domain("gadgets", ("the screen was", "the keyboard was", "the software was", "the camera was", "the controls were"),
           (("unreliable", "faulty", "glitchy", "defective", "useless", "badly designed", "frustrating"),
            ("reliable", "flawless", "dependable", "polished", "well designed", "effective", "user-friendly")),
           ("the tablet arrived on a Monday", "the device weighs about a pound", "the box holds a cable and a manual",
            "this model comes in grey and blue", "I ordered the tablet in October")),
    Domain("books", ("the story was", "the prose was", "the first chapter was", "the sequel was", "the essays were"),
           (("dreary", "plodding", "hackneyed", "shallow", "muddled", "tiresome", "unimaginative"),
            ("absorbing", "engrossing", "enthralling", "enchanting", "engaging", "thoughtful", "eloquent")),
           ("the book has twelve chapters", "I read the book on the train", "the paperback came out last autumn",
            "the author lives in a village by the sea", "our club picked the book in May")),
    Domain("concerts", ("the band was", "the singer was", "the drummer was", "the choir was", "the encores were"),
           (("uninspired", "sloppy", "listless", "lacklustre", "lethargic", "amateurish", "out of tune"),
            ("electrifying", "exhilarating", "thrilling", "mesmerising", "inspired", "dazzling", "brilliant")),
           ("the concert began at eight", "we stood on the left of the stage", "the hall holds nine hundred people",
            "the next stop of the band is Lisbon", "there was one interval")),
)
# fmt: on


def pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    """Returns one of the options, each as likely as the others."""
    return options[int(rng.integers(len(options)))]


def clause(rng: np.random.Generator, domain: Domain, subject: str, label: int, negated: bool) -> str:
    """Returns a clause that means the label: a negated one carries an adjective of the other label."""
    sense = 1 - label if negated else label
    adjectives = (BLAME, PRAISE) if rng.random() < SHARED else domain.adjectives
    thing, be = subject.rsplit(" ", 1)
    verb = pick(rng, NEGATIONS if negated else AFFIRMATIONS).replace("{be}", be)
    degree = pick(rng, INTENSIFIERS) + " " if not negated and rng.random() < INTENSE else ""
    return f"{thing} {verb} {degree}{pick(rng, adjectives[sense])}"


def plain(rng: np.random.Generator, domain: Domain, label: int) -> str:
    """Returns one clause, reported, denied or neither; a denied clause means the other label."""
    subject = pick(rng, domain.subjects)
    if rng.random() < DENIED:
        return f"{pick(rng, DENIALS)} {clause(rng, domain, subject, 1 - label, negated=False)}"
    report = pick(rng, REPORTS) + " " if rng.random() < REPORTED else ""
    return report + clause(rng, domain, subject, label, negated=rng.random() < NEGATED)


def double(rng: np.random.Generator, domain: Domain, label: int, contrast: bool) -> str:
    """Returns two clauses on two subjects: the main one means the label, the other its opposite or the same."""
    first, second = (domain.subjects[i] for i in rng.permutation(len(domain.subjects))[:2])
    main = clause(rng, domain, first, label, negated=rng.random() < NEGATED)
    other = clause(rng, domain, second, 1 - label if contrast else label, negated=rng.random() < NEGATED)
    return pick(rng, CONTRASTS if contrast else ADDITIONS).format(main=main, weak=other, also=other)


def sentence(rng: np.random.Generator, domain: Domain, label: int) -> str:
    """Returns one sentence about the domain that means the label."""
    draw = rng.random()
    core = plain(rng, domain, label) if draw < PLAIN else double(rng, domain, label, contrast=draw < PLAIN + CONTRAST)
    return finished(rng, domain, core)


def finished(rng: np.random.Generator, domain: Domain, core: str) -> str:
    """Returns a sentence with its capital and its full stop, perhaps with a fact that means nothing."""
    if rng.random() < REMARKED:
        core = pick(rng, REMARKS).format(fact=pick(rng, domain.facts), core=core)
    return written(core)


def written(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def pair(rng: np.random.Generator, domain: Domain, label: int) -> tuple[str, str]:
    """Returns a premise, and a hypothesis that follows from it (0), is on something else (1), or denies it (2)."""
    subject, other = (domain.subjects[i] for i in rng.permutation(len(domain.subjects))[:2])
    meant, elsewhere = (int(draw) for draw in rng.integers(2, size=2))
    premise = clause(rng, domain, subject, meant, negated=rng.random() < NEGATED)
    about, claim = ((subject, meant), (other, elsewhere), (subject, 1 - meant))[label]
    hypothesis = clause(rng, domain, about, claim, negated=rng.random() < NEGATED)
    return finished(rng, domain, premise), written(hypothesis)


def split_of(text: str) -> str:
    """Returns the only split in which a sentence may occur: one sentence in five is for validation."""
    return "validation" if hashlib.sha256(text.encode()).digest()[0] % 5 == 0 else "train"


Rows = list[dict[str, str | int]]


def generator(purpose: str, split: str, seed: int) -> np.random.Generator:
    """Returns the stream of a split, or raises."""
    if split not in SPLITS:
        raise UserError(f"The generator has no split '{split}'; choose one of {', '.join(SPLITS)}.")
    return numpy_stream(seed, purpose, split)


def sentences(split: str, num_rows: int, seed: int = 0) -> Rows:
    """Returns distinct rows of a sentence, its label and its domain; each pair of rows has one of each label."""
    rng = generator("sentences", split, seed)
    rows: dict[str, dict[str, str | int]] = {}
    label = 0
    while len(rows) < num_rows:
        label = 1 - label if len(rows) % 2 else int(rng.integers(2))
        domain = DOMAINS[int(rng.integers(len(DOMAINS)))]
        text = sentence(rng, domain, label)
        while len(text.split()) not in NUM_WORDS or split_of(text) != split or text in rows:
            text = sentence(rng, domain, label)
        rows[text] = {"sentence": text, "label": label, "domain": domain.name}
    return list(rows.values())


def pairs(split: str, num_rows: int, seed: int = 0) -> Rows:
    """Returns rows of a distinct premise, a hypothesis, the label and the domain; each three have one of each label."""
    rng = generator("pairs", split, seed)
    rows: dict[str, dict[str, str | int]] = {}
    labels = list[int]()
    while len(rows) < num_rows:
        labels = labels or rng.permutation(3).tolist()
        domain, label = DOMAINS[int(rng.integers(len(DOMAINS)))], labels.pop()
        premise, hypothesis = pair(rng, domain, label)
        while split_of(premise) != split or premise in rows:
            premise, hypothesis = pair(rng, domain, label)
        rows[premise] = {"premise": premise, "hypothesis": hypothesis, "label": label, "domain": domain.name}
    return list(rows.values())


BUILTINS: dict[str, Callable[[str, int], Rows]] = {"builtin/sentences": sentences, "builtin/pairs": pairs}


@cache
def built_in(path: str, split: str) -> Rows:
    """Returns the rows of a split of a built-in table."""
    return BUILTINS[path](split, BUILTIN_ROWS[split])
