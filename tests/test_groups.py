"""Groups of rows without labels: what they are by length and by topic, and that they are shared out as labels are."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import cast

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dfl_lora.choices import Choice, choice
from dfl_lora.data.groups import Grouped, by_length, by_topic, weighed
from dfl_lora.data.partition import PARTITIONS, Rows, Table, counts, dirichlet, grouped, length, topic
from dfl_lora.data.shares import shares
from dfl_lora.data.sources import load_rows
from dfl_lora.data.splits import joined_texts
from dfl_lora.errors import UserError
from dfl_lora.reading import parse
from real import real

KITCHEN = ["oven", "bread", "flour", "butter", "sugar", "salt", "bake", "knead", "dough", "cake", "yeast", "spoon"]
SEA = ["boat", "sail", "harbour", "wave", "captain", "anchor", "storm", "deck", "mast", "sailor", "island", "tide"]


def spoken(num_rows: int, *vocabularies: list[str], seed: int = 0) -> list[str]:
    """Texts of eight words, each of one vocabulary, these in turn, beside a stop word and a number."""
    drawn = np.random.default_rng(seed)
    several = [drawn.choice(vocabularies[row % len(vocabularies)], 8) for row in range(num_rows)]
    return [f"The {' '.join(words)} {row}." for row, words in enumerate(several)]


def sizes_of(grouped: Grouped) -> list[int]:
    return np.bincount(grouped.ids, minlength=len(grouped.names)).tolist()


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=80), groups=st.integers(1, 12))
@example(lengths=[5] * 70 + [6, 7], groups=3)
@example(lengths=[1, 2] + [9] * 70, groups=3)
@settings(deadline=None)
def test_groups_by_length_are_all_there_from_short_to_long_and_one_length_is_in_one(
    lengths: list[int], groups: int
) -> None:
    rows = np.array(lengths)
    if len(set(lengths)) < groups:
        few = f"{len(set(lengths))} different lengths, too few for {groups} groups; use"
        with pytest.raises(UserError, match=few if len(set(lengths)) > 1 else "which makes no groups"):
            by_length(rows, groups)
        return
    found = by_length(rows, groups)
    held = [rows[found.ids == k] for k in range(groups)]
    assert found.ids.dtype == np.int64 and len(found.ids) == len(lengths) and len(found.names) == groups
    assert all(one.max() < other.min() for one, other in pairwise(held))
    spans = [f"{part.min()}-{part.max()} tokens" if part.min() < part.max() else f"{part[0]} tokens" for part in held]
    assert list(found.names) == spans


@given(num_rows=st.integers(1, 200), groups=st.integers(1, 12), seed=st.integers(0, 99))
def test_groups_of_different_lengths_differ_by_one_row_at_most(num_rows: int, groups: int, seed: int) -> None:
    lengths = np.random.default_rng(seed).permutation(num_rows) + 1
    if groups <= num_rows:
        sizes = sizes_of(by_length(lengths, groups))
        assert max(sizes) - min(sizes) <= 1


def test_a_border_between_groups_of_equal_lengths_is_the_nearest_to_the_quantile() -> None:
    lengths = np.array([8] * 3 + [9] * 4 + [30] + [31] * 5 + [900] * 3)
    assert by_length(lengths, 2).names == ("8-30 tokens", "31-900 tokens")
    assert by_length(lengths, 3).names == ("8-9 tokens", "30-31 tokens", "900 tokens")
    assert sizes_of(by_length(lengths, 5)) == [3, 4, 1, 5, 3]


def test_two_vocabularies_are_two_topics_named_after_their_words() -> None:
    texts = spoken(300, KITCHEN, SEA, SEA)
    found = by_topic(texts, 2, 0)
    assert found.ids.tolist() == [1, 0, 0] * 100  # the larger first
    sea, kitchen = (set(name.split(", ")) for name in found.names)
    assert len(sea) == len(kitchen) == 3 and sea < set(SEA) and kitchen < set(KITCHEN)


@pytest.mark.parametrize("groups", [1, 3, 8])
def test_topics_are_numbered_by_size_and_are_a_function_of_texts_and_seed(groups: int) -> None:
    texts = spoken(200, KITCHEN, SEA, KITCHEN + SEA)
    found, again = by_topic(texts, groups, 3), by_topic(texts, groups, 3)
    assert found.ids.tolist() == again.ids.tolist() and found.names == again.names
    sizes = sizes_of(found)
    assert found.ids.dtype == np.int64 and sizes == sorted(sizes, reverse=True) and sizes[-1] > 0
    assert len(set(found.names)) == groups == len(sizes) and sum(sizes) == 200


def test_another_seed_gives_other_topics_where_there_are_none_by_nature() -> None:
    texts = spoken(200, KITCHEN)
    assert by_topic(texts, 6, 0).ids.tolist() != by_topic(texts, 6, 1).ids.tolist()


def test_topics_are_the_same_on_one_thread_and_on_several() -> None:
    """Rows are enough for several threads, which take 256 each, and of one vocabulary, so that borders are near."""
    texts = spoken(3000, KITCHEN + SEA)
    code = (
        "import json, sys; from dfl_lora.data.groups import by_topic; "
        "print(json.dumps(by_topic(json.load(sys.stdin), 9, 0).ids.tolist()))"
    )
    found = [
        subprocess.run(
            [sys.executable, "-c", code], input=json.dumps(texts), capture_output=True, text=True, check=True,
            env=os.environ | {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads},
        ).stdout
        for threads in ("1", "2")
    ]  # fmt: skip
    assert found[0] == found[1] and json.loads(found[0]) == by_topic(texts, 9, 0).ids.tolist()


def test_sums_of_weights_are_exact_in_any_order() -> None:
    vectors, _ = weighed(spoken(500, KITCHEN, SEA))
    assert vectors[::-1].sum(axis=0).tolist() == vectors.sum(axis=0).tolist() and (vectors.data * 2**20 % 1 == 0).all()


def test_rows_without_words_are_a_topic_of_their_own() -> None:
    found = by_topic(["oven bread"] * 40 + ["", "the 12", "7 + 5", "?", "and I"] * 4, 2, 0)
    assert found.ids.tolist() == [0] * 40 + [1] * 20 and found.names[1] == "no words"


def test_topics_that_share_their_heaviest_words_have_different_names() -> None:
    found = by_topic(["apple"] * 5 + ["apple " * k + "pear " * (9 - k) for k in range(1, 9)], 9, 0)
    assert len(set(found.names)) == 9 and any(name.endswith("(2)") for name in found.names)


@pytest.mark.parametrize(("texts", "groups", "words"), [
    (["the 12 a", "", "and I"], 2, "None of 3 rows has a word to tell its topic by"),
    (["a boat", "a sail"], 3, "2 rows have 2 different contents as to their words, too few for 3 groups; use at most"),
    (["one boat 1", "two boat 2", "A boat?", "a sail"], 3, "4 rows have 2 different contents"),
    (["boat"] * 9, 2, "9 rows have 1 different contents"),
])  # fmt: skip
def test_rows_that_cannot_make_the_topics_are_one_clear_error(texts: list[str], groups: int, words: str) -> None:
    with pytest.raises(UserError, match=words) as refusal:
        by_topic(texts, groups, 0)
    assert "use " in str(refusal.value) and "\n" not in str(refusal.value)


BY_GROUP: dict[str, Callable[..., list[Rows]]] = {"length": length, "topic": topic}


def table_of(texts: Sequence[str]) -> Table:
    lengths = np.array([len(text) for text in texts], dtype=np.int64)
    return Table(np.zeros(len(texts), dtype=np.int64), lambda name: [], lambda: lengths, lambda: texts)


def how_to(name: str) -> Choice:
    return cast(Choice, parse(choice(PARTITIONS, "iid"), name, "partition"))


def groups_by(name: str, table: Table, seed: int = 0) -> Grouped:
    found = grouped(how_to(name), table, seed)
    assert found is not None
    return found


def lists(parts: Sequence[Rows]) -> list[list[int]]:
    return [part.tolist() for part in parts]


@pytest.mark.parametrize("way", BY_GROUP)
def test_groups_are_shared_out_as_labels_are(way: str) -> None:
    table = table_of(spoken(300, KITCHEN, SEA))
    groups = groups_by(f"{way}(groups=4)", table, 5)
    labelled = Table(groups.ids, table.column)
    assert len(groups.names) == 4
    assert lists(BY_GROUP[way](table, 3, 5, 9, groups=4, alpha=0.4)) == lists(dirichlet(labelled, 3, 5, 9, alpha=0.4))


@pytest.mark.parametrize("way", BY_GROUP)
def test_groups_are_skewed_more_where_alpha_is_smaller(way: str) -> None:
    table = table_of(spoken(600, KITCHEN, SEA))

    def skew(alpha: float, seed: int) -> float:
        parts, groups = BY_GROUP[way](table, 4, seed, 1, alpha=alpha), groups_by(way, table, seed)
        return shares(counts([groups.ids[part] for part in parts], 10)).label_skew or 0.0

    means = [np.mean([skew(alpha, seed) for seed in range(5)]) for alpha in (0.05, 0.5, 5.0, 500.0)]
    assert means == sorted(means, reverse=True) and means[0] > 0.5 and means[-1] < 0.1


@pytest.mark.parametrize("way", BY_GROUP)
def test_rows_are_grouped_once_whoever_asks(way: str) -> None:
    asked, plain = list[str](), table_of([f"boat {'sail ' * k}" for k in range(30)] + spoken(60, KITCHEN))
    assert plain.lengths is not None and plain.texts is not None
    lengths, texts = plain.lengths(), plain.texts()
    table = replace(plain, lengths=lambda: (asked.append("length"), lengths)[1],
                    texts=lambda: (asked.append("topic"), texts)[1])  # fmt: skip
    first = groups_by(way, table, 1)
    how_to(way).of(table, 3, 1, 1)
    assert groups_by(way, table, 1) is first and asked == [way]


def test_partitions_of_labels_and_sizes_make_no_groups() -> None:
    for name in set(PARTITIONS) - set(BY_GROUP) - {"natural", "saved"}:
        assert grouped(how_to(name), table_of(spoken(9, SEA)), 0) is None


@pytest.mark.parametrize("way", BY_GROUP)
def test_rows_that_are_no_texts_have_no_groups_of_texts(way: str) -> None:
    with pytest.raises(UserError, match=r"These rows are no texts.*; use a partition by size"):
        BY_GROUP[way](Table(np.zeros(20, dtype=np.int64), lambda name: []), 2, 0, 1)


@pytest.mark.parametrize("way", BY_GROUP)
def test_more_groups_than_the_rows_can_make_are_one_clear_error(way: str) -> None:
    table = table_of(["a boat", "a sail", "two sailors"] * 30)
    with pytest.raises(UserError, match=r"90 rows have [23] different .*, too few for 10 groups; use at most [23]"):
        BY_GROUP[way](table, 2, 0, 1)


@pytest.mark.parametrize("name", ["gsm8k", "tinystories"])
def test_real_texts_fall_into_ten_groups_and_those_are_skewed_by_alpha(name: str) -> None:
    (folder,) = real(name)
    table = table_of(joined_texts(load_rows(str(folder), None, "train"), None, name))
    assert table.texts is not None
    long, topics = groups_by("length", table), groups_by("topic", table)
    sizes, of_topics = sizes_of(long), sizes_of(topics)
    assert sum(sizes) == len(table) and max(sizes) < 1.1 * min(sizes)
    assert min(of_topics) > 0.005 * len(table) and of_topics[0] < 0.6 * len(table)
    assert all(len(words.split(", ")) == 3 for words in topics.names) and len(set(topics.names)) == 10
    for way, groups in (("length", long), ("topic", topics)):
        skews = []
        for alpha in (0.1, 100.0):
            parts = BY_GROUP[way](table, 7, 0, 20, alpha=alpha)
            assert sorted(np.concatenate(parts).tolist()) == list(range(len(table))) and min(map(len, parts)) >= 20
            skews.append(shares(counts([groups.ids[part] for part in parts], 10)).label_skew or 0.0)
        assert skews[0] > 0.4 > 0.1 > skews[1]


def test_values_of_a_column_are_groups_where_they_are_few() -> None:
    how = how_to("natural(column=site)")
    few = Table(np.zeros(6, dtype=np.int64), lambda name: ["b", "a", "a", 3, "b", "a"])
    found = grouped(how, few, 0)
    assert found is not None and found.names == ("b", "a", "3") and found.ids.tolist() == [0, 1, 1, 2, 0, 1]
    assert grouped(how, Table(np.zeros(51, dtype=np.int64), lambda name: list(range(51))), 0) is None
