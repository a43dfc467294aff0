"""Groups: rows put together by what they hold, so that groups play the part of labels where rows have none.

    by_length   n lengths cut at their quantiles: border k lies between the two lengths where the number of rows below
                it is nearest to k n / G, so that rows of one length stay together
    by_topic    k-means (Lloyd 1982; k-means++, Arthur and Vassilvitskii 2007) of TF-IDF vectors
                v_w = (1 + log tf_w) (1 + log((1 + n) / (1 + n_w))), scaled to length 1, where a row holds word w tf_w
                times and n_w of the n rows hold it; without the logarithm of tf_w most rows fell into one group

Words are runs of two letters or more, in lower case, without English stop words: numbers say little of what a text is
about. Of more than MOST_WORDS words those are taken that the most rows hold, ties by the alphabet. Every
machine must find the same groups: weights are multiples of 2^-20, whose sums are exact in any order, and k-means runs
on one thread, since the centres of two differed in their last bits.
"""

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dfl_lora.errors import UserError
from dfl_lora.streams import stream

Rows = NDArray[np.int64]
WORD = r"[^\W\d_]{2,}"
MOST_WORDS, STARTS, TERMS, UNIT = 2000, 4, 3, 2.0**-20


@dataclass(frozen=True)
class Grouped:
    """The group of every row [rows], and the names of the groups."""

    ids: Rows
    names: tuple[str, ...]


def by_length(lengths: Rows, groups: int) -> Grouped:
    """Returns groups of rows of like length, the shortest first, as equal as rows of the same length allow."""
    values, counts = np.unique(lengths, return_counts=True)
    if len(values) == 1 < groups:
        each = f"Each of {len(lengths)} rows has {span(values[0], values[0])}"
        raise UserError(f"{each}, which makes no groups; use another partition.")
    if len(values) < groups:
        raise UserError(
            f"{len(lengths)} rows have {len(values)} different lengths, too few for {groups} groups; "
            f"use at most {len(values)} groups, or more data."
        )
    ends, starts = np.cumsum(counts), [0]  # a group starts with the value of that number
    for k in range(1, groups):
        first, last = starts[-1] + 1, len(values) - (groups - k)
        starts.append(first + int(np.argmin(abs(ends[first - 1 : last] - k * len(lengths) / groups))))
    ids = np.searchsorted(values[starts], lengths, side="right") - 1
    return Grouped(ids, tuple(span(values[a], values[b - 1]) for a, b in pairwise([*starts, len(values)])))


def by_value(values: Sequence[object]) -> Grouped:
    """Returns a group for each value of a column, in the order in which they occur."""
    numbers, names, ids = dict[str, int](), list[str](), list[int]()
    for value in values:
        if (key := repr(value)) not in numbers:
            numbers[key] = len(names)
            names.append(str(value))
        ids.append(numbers[key])
    return Grouped(np.array(ids, dtype=np.int64), tuple(names))


def span(least: int, most: int) -> str:
    return f"{least} tokens" if least == most else f"{least}-{most} tokens"


def by_topic(texts: Sequence[str], groups: int, seed: int) -> Grouped:
    """Returns groups of rows with like words, the largest first, each named after the heaviest words of its centre."""
    from sklearn.cluster import KMeans  # heavy
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    if len(texts) < groups:
        raise too_few(len(texts), len(texts), groups)
    vectors, words = weighed(texts)
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there are too few different rows is said below
        found = KMeans(groups, n_init=STARTS, random_state=stream(seed, "topics") % 2**32).fit(vectors)
    kinds, first, ids, sizes = np.unique(found.labels_, return_index=True, return_inverse=True, return_counts=True)
    if len(kinds) < groups:
        raise too_few(len(texts), len(kinds), groups)
    order = np.lexsort((first, -sizes))
    return Grouped(np.argsort(order)[ids], names_of(found.cluster_centers_[order], words))


def weighed(texts: Sequence[str]) -> tuple[Any, NDArray[np.object_]]:
    """Returns the TF-IDF vectors of texts, sparse [rows, words], and the words."""
    from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer  # heavy

    counter = CountVectorizer(stop_words="english", token_pattern=WORD)
    try:
        counted = counter.fit_transform(texts)
    except ValueError:  # an empty vocabulary
        raise UserError(
            f"None of {len(texts)} rows has a word to tell its topic by, of two letters or more and no English stop "
            "word; use a partition by length or size."
        ) from None
    frequent = np.argsort(-counted.getnnz(axis=0), kind="stable")[:MOST_WORDS]  # max_features leaves ties to chance
    kept = np.sort(frequent)
    vectors = TfidfTransformer(sublinear_tf=True).fit_transform(counted[:, kept])
    vectors.data = np.round(vectors.data / UNIT) * UNIT
    return vectors, counter.get_feature_names_out()[kept]


def names_of(centres: NDArray[np.float64], words: NDArray[np.object_]) -> tuple[str, ...]:
    """Returns the heaviest words of each centre [groups, words]; names that come again are counted."""
    names, seen = list[str](), Counter[str]()
    for centre in centres:
        heaviest = np.argsort(-centre, kind="stable")[:TERMS]
        name = ", ".join(words[k] for k in heaviest if centre[k] > 0) or "no words"
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return tuple(names)


def too_few(num_rows: int, num_different: int, groups: int) -> UserError:
    return UserError(
        f"{num_rows} rows have {num_different} different contents as to their words, too few for {groups} groups; "
        f"use at most {num_different} groups, or more data."
    )
