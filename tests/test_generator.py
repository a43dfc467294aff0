"""The built-in sentences: balanced, repeatable, fluent in their grammar, and not solved by single words."""

import re
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from dfl_lora.data.generator import BLAME, DOMAINS, NUM_WORDS, PRAISE, Rows, clause, pairs, sentences, split_of
from dfl_lora.errors import UserError
from dfl_lora.streams import numpy_stream

GOOD = ("delicious", "tasty", "superb", "gripping", "moving", "spotless", "cosy", "reliable", "flawless", "engaging")
BAD = ("bland", "tasteless", "awful", "dull", "boring", "filthy", "shabby", "faulty", "dreary", "sloppy", "terrible")
IS = "(?<!never )(?<!hardly )(?:was|were|seemed|proved|turned out to be|came across as)(?: really| truly| simply)?"


@pytest.fixture(scope="module")
def train() -> Rows:
    return sentences("train", 6000)


def texts(rows: Rows) -> list[str]:
    return [str(row["sentence"]) for row in rows]


def words(row: dict[str, str | int]) -> list[str]:
    return re.findall(r"[a-z]+", str(row["sentence"]).lower())


def labels_where(rows: Rows, pattern: str, adjectives: tuple[str, ...]) -> set[int]:
    """Returns the labels of the sentences that match; IS and ADJ in the pattern stand for verbs and adjectives."""
    compiled = re.compile(pattern.replace("IS", IS).replace("ADJ", f"(?:{'|'.join(adjectives)})"))
    labels = [int(row["label"]) for row in rows if compiled.search(str(row["sentence"]))]
    assert len(labels) >= 5, f"only {len(labels)} sentences match {pattern}"
    return set(labels)


def bag_of_words_accuracy(train: Rows, validation: Rows) -> float:
    """Returns the accuracy of a naive Bayes classifier that sees which words a sentence has, in no order."""
    vocabulary = {word: i for i, word in enumerate(sorted({word for row in train for word in words(row)}))}

    def counts(rows: Rows) -> np.ndarray:
        matrix = np.zeros((len(rows), len(vocabulary)))
        for i, row in enumerate(rows):
            for word in words(row):
                if word in vocabulary:
                    matrix[i, vocabulary[word]] += 1
        return matrix

    seen, label = counts(train), np.array([row["label"] for row in train])
    good, bad = (seen[label == value].sum(axis=0) + 1 for value in (1, 0))
    weights = np.log(good / good.sum()) - np.log(bad / bad.sum())
    guesses = (counts(validation) @ weights > 0).astype(int)
    return float(np.mean(guesses == np.array([row["label"] for row in validation])))


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("seed", [0, 1])
def test_labels_are_balanced_within_five_percent(split: str, seed: int) -> None:
    assert abs(np.mean([int(row["label"]) for row in sentences(split, 201, seed)]) - 0.5) < 0.05


def test_the_same_seed_gives_the_same_rows() -> None:
    assert sentences("train", 100, seed=3) == sentences("train", 100, seed=3)


def test_fewer_rows_are_the_first_of_more_rows() -> None:
    assert sentences("train", 50) == sentences("train", 100)[:50]


def test_another_seed_gives_other_rows() -> None:
    assert len(set(texts(sentences("train", 200, seed=0))) & set(texts(sentences("train", 200, seed=1)))) < 10


def test_splits_share_no_sentence_whatever_the_seed(train: Rows) -> None:
    validation = sentences("validation", 500, seed=0) + sentences("validation", 500, seed=1)
    assert not set(texts(train)) & set(texts(validation))
    assert {split_of(text) for text in texts(train)} == {"train"}


@pytest.mark.parametrize("make", [sentences, pairs])
def test_an_unknown_split_is_an_error(make: Callable[[str, int], Rows]) -> None:
    with pytest.raises(UserError, match=r"'test'.*train, validation"):
        make("test", 1)


def test_every_domain_appears_with_both_labels() -> None:
    rows = sentences("train", 500)
    assert {(row["domain"], row["label"]) for row in rows} == {(d.name, label) for d in DOMAINS for label in (0, 1)}


def test_no_sentence_occurs_twice_and_lengths_vary(train: Rows) -> None:
    lengths = [len(text.split()) for text in texts(train)]
    assert len(set(texts(train))) == len(train)
    assert set(lengths) <= set(NUM_WORDS)
    assert len(set(lengths)) > 18
    assert np.std(lengths) > 3


def test_every_sentence_is_one_finished_line(train: Rows) -> None:
    assert all(re.fullmatch(r"[A-Z][A-Za-z ,;-]+[a-z]\.", text) for text in texts(train))


@pytest.mark.parametrize(
    ("meaning", "pattern"),
    [
        ("a plain word keeps its meaning", r"^The [a-z ]+ IS ADJ[.;]"),
        ("a reported word keeps its meaning", r"^(My|Most|In my opinion,|Everyone) [a-z ]+ IS ADJ[.;]"),
        ("the main clause behind decides", r"^(Although|Even though|While|Despite) [^;]*, the [a-z ]+ IS ADJ[.;]"),
        ("the main clause in front decides", r"^The [a-z ]+ IS ADJ, (although|even if|even though|despite) "),
        ("the clause behind but and yet decides", r"^The [^;]*, (but|yet) the [a-z ]+ IS ADJ[.;]"),
    ],
)
def test_an_affirmed_adjective_has_its_own_label(train: Rows, meaning: str, pattern: str) -> None:
    assert labels_where(train, pattern, GOOD) == {1}, meaning
    assert labels_where(train, pattern, BAD) == {0}, meaning


@pytest.mark.parametrize(
    ("meaning", "pattern"),
    [
        ("a negated word is its opposite", r"(^|; )[A-Za-z ]+ (not|hardly|at all|far from|by no means|seem) ADJ[.;]"),
        ("a denied clause is its opposite", r"(I cannot|I would never|not true|be wrong to) [^;]* ADJ[.;]"),
        ("the concession is outvoted", r"^(Although|Even though|While|Despite) [a-z ]+ IS ADJ,"),
        ("the concession behind is outvoted", r"^[^;]*, (although|even if|even though|despite) [a-z ]+ IS ADJ[.;]"),
        ("the clause before but and yet is outvoted", r"^The [a-z ]+ IS ADJ, (but|yet) "),
    ],
)
def test_a_turned_adjective_has_the_other_label(train: Rows, meaning: str, pattern: str) -> None:
    assert labels_where(train, pattern, GOOD) == {0}, meaning
    assert labels_where(train, pattern, BAD) == {1}, meaning


def test_a_negated_clause_of_a_good_meal_carries_a_bad_word() -> None:
    meals, rng = next(domain for domain in DOMAINS if domain.name == "meals"), numpy_stream(0, "clauses")
    negated = {clause(rng, meals, "the soup was", 1, negated=True) for _ in range(2000)}
    affirmed = {clause(rng, meals, "the soup was", 1, negated=False) for _ in range(2000)}
    assert {"the soup was not bland", "the soup did not seem awful", "the soup was far from terrible"} <= negated
    assert {"the soup was delicious", "the soup was really superb", "the soup seemed excellent"} <= affirmed


def test_single_words_help_but_do_not_solve_the_sentences(train: Rows) -> None:
    assert 0.55 < bag_of_words_accuracy(train[:2000], sentences("validation", 500)) < 0.85


def test_pairs_have_as_many_rows_of_each_label_and_the_same_seed_gives_the_same() -> None:
    rows = pairs("train", 300)
    assert Counter(row["label"] for row in rows) == {0: 100, 1: 100, 2: 100}
    assert rows[:50] == pairs("train", 50) and rows[:50] == pairs("train", 50, seed=0) != pairs("train", 50, seed=1)


def test_no_premise_occurs_twice_or_in_two_splits() -> None:
    premises = {split: [row["premise"] for row in pairs(split, 1000)] for split in ("train", "validation")}
    assert all(len(set(texts)) == 1000 for texts in premises.values())
    assert not set(premises["train"]) & set(premises["validation"])


def test_a_hypothesis_follows_from_its_premise_is_on_something_else_or_denies_it() -> None:
    """Of plain clauses: another subject is neutral, adjectives of one kind follow, of two kinds contradict."""
    plain = re.compile(r"^The ([a-z ]+?)(?<!never)(?<!hardly) (?:was|were|seemed|proved) ([a-z -]+)[.;]")
    adjectives = dict.fromkeys(BLAME, 0) | dict.fromkeys(PRAISE, 1)
    for domain in DOMAINS:
        adjectives |= dict.fromkeys(domain.adjectives[0], 0) | dict.fromkeys(domain.adjectives[1], 1)
    seen = Counter[int]()
    for row in pairs("train", 4000):
        premise, hypothesis = (plain.match(str(row[name])) for name in ("premise", "hypothesis"))
        if premise and hypothesis and premise[2] in adjectives and hypothesis[2] in adjectives:
            same = adjectives[premise[2]] == adjectives[hypothesis[2]]
            assert row["label"] == (1 if premise[1] != hypothesis[1] else 0 if same else 2)
            seen[int(row["label"])] += 1
    assert min(seen[label] for label in range(3)) >= 50


def test_neither_premise_nor_hypothesis_alone_says_the_label() -> None:
    """Which labels a subject and an adjective of the hypothesis go with: all of them."""
    labels: dict[str, set[int]] = {}
    for row in pairs("train", 3000):
        for word in str(row["hypothesis"]).lower().rstrip(".").split():
            labels.setdefault(word, set()).add(int(row["label"]))
    assert all(labels[word] == {0, 1, 2} for word in ("soup", "plot", *GOOD, *BAD))
