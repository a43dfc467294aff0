"""The report of a run: what it holds, what it must never hold, and runs that have little to show."""

import json
import re
from collections.abc import Mapping
from errno import ENOSPC
from html import escape
from html.parser import HTMLParser
from math import inf, nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from dfl_lora.errors import UserError
from dfl_lora.files import write_atomically
from dfl_lora.report import figures
from dfl_lora.report.page import duration, interval, short, size, write_report

HOSTILE = "<script>alert(1)</script>"
FILES = {"recipe.yaml", "rounds.jsonl", "summary.json", "partition.json"}


def record(t: int, num_peers: int) -> dict[str, Any]:
    accuracies = [0.5 + 0.05 * t + 0.01 * i for i in range(num_peers)]
    return {
        "round": t,
        "loss": {"mean": 1.0 / t, "min": 0.5 / t, "max": 2.0 / t},
        "accuracy": {
            "mean": float(np.mean(accuracies)),
            "min": accuracies[0],
            "max": accuracies[-1],
            "per_peer": accuracies,
        },
        "consensus_error": 0.1**t,
        "product_disagreement": 0.2**t,
        "relative_disagreement": 0.01,
        "bytes_sent_per_peer": 1000,
        "messages": 2 * num_peers,
        "seconds": {"train": 1.0, "exchange": 0.1, "evaluate": 0.2, "total": 1.3},
        "tokens": 100,
    }


def summary_of(records: list[dict[str, Any]], num_peers: int) -> dict[str, Any]:
    return {
        "recipe_digest": "0123abcd",
        "num_peers": num_peers,
        "rounds": len(records),
        "accuracy": {**records[-1].get("accuracy", {}), "ci95": 0.0216, "consensus": 0.8125},
        "consensus_error": 0.00321,
        "product_disagreement": 0.0032,
        "relative_disagreement": 0.0123,
        "bytes_sent_per_peer": 5_900_000,
        "seconds": {"total": 342.1, "train": 300.0, "exchange": 12.0, "evaluate": 30.1},
        "tokens_per_second": 15423.2,
        "mfu": None,
        "peak_rss_bytes": 3_100_000_000,
        "versions": {"python": "3.11.2", "torch": "2.13.0"},
    }


def recipe_named(name: str, num_peers: int) -> dict[str, Any]:
    return {
        "name": name,
        "model": "toy",
        "peers": {"num_peers": num_peers, "topology": {"kind": "link3"}},
        "method": {"schedule": "alternate"},
    }


def partition_of(num_peers: int, labels: list[str]) -> dict[str, Any]:
    return {
        "labels": labels,
        "counts": [[10 + i, *[30] * (len(labels) - 1)] for i in range(num_peers)],
        "edges": [[i, (i + 1) % num_peers] for i in range(num_peers) if num_peers > 1],
        "topology": "link3",
        "spectral_gap": 0.25,
        "expected_consensus": 1.2,
    }


def run_in(
    run: Path,
    *,
    num_peers: int = 7,
    rounds: int = 5,
    name: str = "a calm run",
    labels: tuple[str, ...] = ("negative", "positive"),
    changed: Mapping[int, Mapping[str, Any]] | None = None,
) -> Path:
    """Returns a run directory; `changed` replaces keys of the records of some rounds, None takes a key out."""
    records = []
    for t in range(1, rounds + 1):
        merged = {**record(t, num_peers), **(changed or {}).get(t, {})}
        records.append({key: value for key, value in merged.items() if value is not None})
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe_named(name, num_peers), sort_keys=False))
    (run / "rounds.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (run / "summary.json").write_text(json.dumps(summary_of(records, num_peers)))
    (run / "partition.json").write_text(json.dumps(partition_of(num_peers, list(labels))))
    return run


class Page(HTMLParser):
    """What a browser would make of a page: its elements, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(key, value or "") for key, value in attrs]

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


def change(path: Path, **keys: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def report_of(run: Path) -> tuple[str, Page]:
    text = write_report(run).read_text(encoding="utf-8")
    return text, Page(text)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the directory of a run that has its report."""
    directory = run_in(tmp_path_factory.mktemp("run"))
    assert write_report(directory) == directory / "report.html"
    return directory


@pytest.fixture(scope="module")
def text(run: Path) -> str:
    return (run / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def test_the_report_stands_in_the_run_directory_and_nothing_else_is_left_there(run: Path) -> None:
    assert {path.name for path in run.iterdir()} == {*FILES, "report.html"}


def test_the_report_replaces_an_older_one_and_is_the_same_for_the_same_run(tmp_path: Path, text: str) -> None:
    (run_in(tmp_path) / "report.html").write_text("old")
    assert report_of(tmp_path)[0] == text


def test_the_report_needs_nothing_from_outside(text: str, page: Page) -> None:
    assert "http://" not in text and "https://" not in text and "@import" not in text and "<!DOCTYPE svg" not in text
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form", "a"} & set(page.tags)
    assert not [key for key, _ in page.attributes if key.startswith("on") or key in ("src", "srcset", "action")]
    assert all(value.startswith("#") for key, value in page.attributes if key == "href")
    assert text.count("url(") == text.count("url(#")
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes


def test_every_section_and_every_figure_is_there(text: str, page: Page) -> None:
    sections = ("Learning", "Agreement", "Graph and data", "Peers and cost", "Recipe, as it was resolved")
    titles = ("Accuracy", "Training loss", "Distance from agreement", "Relative disagreement", "Training rows by label")
    for title in (*sections, *titles, "link3: 7 edges", "a calm run – report of a run"):
        assert title in page.texts, title
    assert page.tags.count("svg") == 6 and page.attributes.count(("role", "img")) == 6
    assert ("aria-label", "Graph of 7 peers and 7 edges, drawn on a circle") in page.attributes
    assert "prefers-color-scheme: dark" in text and text.startswith("<!DOCTYPE html>")


def test_the_headline_shows_the_summary(page: Page) -> None:
    for value in ("0.7800", "± 0.0216 (95 %)", "0.7500", "0.8125", "0.00321", "0.0123", "5.9 MB", "5 min 42 s"):
        assert value in page.texts, value
    assert "7 peers · 5 rounds · topology link3 · schedule alternate" in page.texts
    assert "Spectral gap 0.25, expected consensus 1.2" in page.texts
    assert "recipe 0123abcd · python 3.11.2 · torch 2.13.0" in page.texts


def test_the_table_has_the_accuracy_and_the_rows_of_each_peer(page: Page) -> None:
    texts = [text for text in page.texts if text]
    start = texts.index("Training rows")
    assert texts[start + 1 : start + 7] == ["0", "0.7500", "40", "1", "0.7600", "41"]


@pytest.mark.parametrize(
    ("metric", "key", "name", "worst", "best"),
    [
        ("f1", "f1", "F1", "0.6500", "0.7100"),
        ("matthews", "matthews", "Matthews correlation", "0.6500", "0.7100"),
        ("loss", "eval_loss", "validation loss", "0.7100", "0.6500"),
    ],
)
def test_a_metric_of_its_own_comes_before_the_accuracy(
    tmp_path: Path, metric: str, key: str, name: str, worst: str, best: str
) -> None:
    """In the headline, as a curve, and in the table of peers; the highest loss is the worst."""
    own = {"mean": 0.68, "min": 0.65, "max": 0.71, "per_peer": [0.65 + 0.01 * i for i in range(7)]}
    run_in(tmp_path, changed={t: {key: own} for t in range(1, 6)})
    change(tmp_path / "summary.json", **{"metric": metric, key: {**own, "ci95": 0.0111, "consensus": 0.6999}})
    _, page = report_of(tmp_path)
    texts = [text for text in page.texts if text]
    title = name[0].upper() + name[1:]
    order = ("highest", "lowest") if metric == "loss" else ("lowest", "highest")
    assert texts[texts.index(title) : texts.index("Accuracy")] == [
        title, "0.6800", "± 0.0111 (95 %)", "Worst peer", worst, f"{order[0]} {name}",
        "Best peer", best, f"{order[1]} {name}", "Consensus", "0.6999", f"{name} of the average",
    ]  # fmt: skip
    assert ("aria-label", f"{title} of the peers in each round") in page.attributes
    assert page.tags.count("svg") == 7 and texts.count(title) == 2
    start = texts.index(f"Final {name}")
    assert texts[start : start + 8] == [
        f"Final {name}", "Final accuracy", "Training rows", "0", "0.6500", "0.7500", "40", "1",
    ]  # fmt: skip


@pytest.mark.parametrize("metric", ["accuracy", HOSTILE, None, ["f1"], {"f1": 1}])
def test_a_metric_that_is_none_leaves_the_accuracy_alone(tmp_path: Path, metric: object) -> None:
    run_in(tmp_path)
    change(tmp_path / "summary.json", metric=metric)
    text, page = report_of(tmp_path)
    assert page.texts.count("Worst peer") == 1 and page.tags.count("svg") == 6 and HOSTILE not in text


def test_text_is_drawn_as_text(page: Page) -> None:
    assert "text" in page.tags and "training rows" in page.texts


def test_ids_are_unique_and_every_reference_has_its_id(page: Page) -> None:
    ids = [value for key, value in page.attributes if key == "id"]
    used = [value[1:] for key, value in page.attributes if key.endswith("href")]
    used += [value[5:-1] for key, value in page.attributes if key == "clip-path"]
    used += [value for key, value in page.attributes if key == "aria-labelledby"]
    assert len(ids) == len(set(ids)) and used and set(used) <= set(ids)


def test_colours_and_fonts_follow_the_page(page: Page) -> None:
    styles = [value for key, value in page.attributes if key == "style"]
    assert any("stroke: var(--first)" in style for style in styles)
    assert not any("#2a6fb5" in style or "font-family" in style for style in styles)


def test_hostile_text_appears_only_escaped(tmp_path: Path) -> None:
    labels = (HOSTILE, '"><svg onload="alert(1)">', "$\\frac{$", "_hidden", "\x00\x1b\ud800")
    run_in(tmp_path, name=HOSTILE, labels=labels)
    with (tmp_path / "recipe.yaml").open("a") as file:
        file.write("path: '</pre><script>alert(2)</script>{{ 7 * 7 }}'\n")
    change(tmp_path / "summary.json", versions={HOSTILE: HOSTILE}, recipe_digest=HOSTILE)
    change(tmp_path / "partition.json", topology=HOSTILE)
    text, page = report_of(tmp_path)
    assert "<script" not in text and text.count(escape(HOSTILE)) >= 8 and "{{ 7 * 7 }}" in text
    assert "script" not in page.tags and not [key for key, _ in page.attributes if key.startswith("on")]
    assert page.tags.count("svg") == 6 and page.tags.count("pre") == 1
    assert {HOSTILE, "$\\frac{$", "_hidden", f"{HOSTILE}: 7 edges"} <= set(page.texts)


def test_a_run_of_one_peer_and_one_round_has_every_figure(tmp_path: Path) -> None:
    _, page = report_of(run_in(tmp_path, num_peers=1, rounds=1))
    assert page.tags.count("svg") == 6 and "link3: 0 edges" in page.texts
    assert "1 peer · 1 round · topology link3 · schedule alternate" in page.texts
    assert "95 % interval of the mean" not in page.texts


def test_a_run_with_nothing_to_draw_says_so(tmp_path: Path) -> None:
    (
        run_in(tmp_path, changed={t: {"accuracy": None, "loss": {"mean": nan}} for t in range(1, 6)}) / "partition.json"
    ).unlink()
    change(tmp_path / "summary.json", accuracy=None, seconds=None, versions=None)
    _, page = report_of(tmp_path)
    assert "Graph and data" not in page.texts and page.tags.count("svg") == 2
    assert (
        "No round of this run was evaluated." in page.texts and "No round of this run has a finite loss." in page.texts
    )
    assert "Nothing was recorded for single peers." in page.texts and "–" in page.texts
    assert "7 peers · 5 rounds · topology link3 · schedule alternate" in page.texts


def test_the_rows_of_the_peers_are_a_chart_a_table_and_how_unequal_they_are(tmp_path: Path) -> None:
    change(run_in(tmp_path, num_peers=3) / "partition.json", counts=[[10, 30], [0, 1200], [5, 0]])
    _, page = report_of(tmp_path)
    assert "Rows: mean 415, 5 to 1,200 (ratio 240); label skew 0.413, effective labels 1.25" in page.texts
    texts = [text for text in page.texts if text]
    start = texts.index("Training rows by label, as a table")
    assert texts[start + 1 : start + 21] == [
        "Peer", "negative", "positive", "rows", "share",
        "0", "10", "30", "40", "3.2%", "1", "0", "1,200", "1,200", "96.4%", "2", "5", "0", "5", "0.4%",
    ]  # fmt: skip


def test_a_run_without_rounds_and_without_labels_still_shows_its_graph(tmp_path: Path) -> None:
    (run_in(tmp_path) / "rounds.jsonl").write_text("")
    change(tmp_path / "partition.json", labels=[], counts=[[]] * 7)
    _, page = report_of(tmp_path)
    assert page.tags.count("svg") == 1 and "link3: 7 edges" in page.texts
    assert "The rows of this run have no labels." in page.texts


def test_rounds_that_were_not_evaluated_are_left_out_of_the_accuracy() -> None:
    records = [record(t, 3) for t in range(1, 6)]
    for t in (0, 2):
        del records[t]["accuracy"]
    drawing = figures.metric(records, "accuracy", "Accuracy")
    assert drawing is not None and len(re.findall(r"<use[^>]*stroke: var\(--first\)", drawing.svg)) == 3


@pytest.mark.parametrize(("num_peers", "rounds"), [(1, 5), (7, 1), (70, 2)])
def test_the_accuracy_of_few_rounds_or_of_many_peers_is_drawn(num_peers: int, rounds: int) -> None:
    drawing = figures.metric([record(t, num_peers) for t in range(1, rounds + 1)], "accuracy", "Accuracy")
    assert drawing is not None
    assert drawing.note == ("Thin lines: 64 of 70 peers." if num_peers == 70 else "")


def test_a_loss_that_is_not_finite_is_left_out_and_counted() -> None:
    lost = {"loss": {"mean": nan, "min": nan, "max": inf}}
    drawing = figures.loss([record(1, 3), {**record(2, 3), **lost}, record(3, 3), {**record(4, 3), **lost}])
    assert drawing is not None and drawing.note == "2 of 4 rounds have no finite loss and are left out."


def test_zeros_on_the_logarithmic_axis_are_explained() -> None:
    some = figures.consensus([record(1, 3), {**record(2, 3), "consensus_error": 0.0}])
    every = figures.relative([{**record(t, 3), "relative_disagreement": 0.0} for t in (1, 2)])
    assert some is not None and some.note == "Open triangles are zeros, which a logarithmic axis cannot show."
    assert every is not None and every.note == "All are zero: the peers agree exactly."


def test_extreme_values_are_drawn() -> None:
    first = {**record(1, 3), "consensus_error": 1e-300, "product_disagreement": 1e200}
    assert figures.consensus([first, record(2, 3)]) is not None
    assert figures.loss([{**first, "loss": {"mean": 1e300, "min": 0.0, "max": inf}}, record(2, 3)]) is not None


def test_every_label_has_a_colour_of_its_own() -> None:
    for count in (1, 10, 11, 77):
        assert len(set(figures.label_colors(count))) == count


@pytest.mark.parametrize("file", ["recipe.yaml", "rounds.jsonl", "summary.json"])
def test_an_absent_file_is_named(tmp_path: Path, file: str) -> None:
    (run_in(tmp_path) / file).unlink()
    with pytest.raises(UserError, match=file):
        write_report(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == FILES - {file}


@pytest.mark.parametrize("file", sorted(FILES))
def test_a_damaged_file_is_named(tmp_path: Path, file: str) -> None:
    (run_in(tmp_path) / file).write_text('{"round": [')
    with pytest.raises(UserError, match=file):
        write_report(tmp_path)


@pytest.mark.parametrize(
    "wrong", [{"edges": [[0, 7]]}, {"edges": [["0", "1"]]}, {"counts": [[1, 2, 3]]}, {"counts": []}]
)
def test_a_partition_whose_parts_do_not_fit_is_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    change(run_in(tmp_path) / "partition.json", **wrong)
    with pytest.raises(UserError, match="partition"):
        write_report(tmp_path)


def test_a_failure_to_write_leaves_the_old_report_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*paths: object) -> None:
        raise OSError(ENOSPC, "no space")

    (tmp_path / "report.html").write_text("old")
    monkeypatch.setattr("pathlib.Path.replace", refuse)
    with pytest.raises(OSError, match="no space"):
        write_atomically(tmp_path / "report.html", b"new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_the_interval_is_that_of_student() -> None:
    assert figures.half_width(np.array([1.0, 2.0, 3.0, nan])) == pytest.approx(4.302653 / 3**0.5, rel=1e-6)
    assert np.isnan(figures.half_width(np.array([1.0])))


def test_numbers_are_written_as_a_person_reads_them() -> None:
    assert [size(b) for b in (0, 999, 999_600, 5.9e6, 1e18, nan)] == [
        "0 B",
        "999 B",
        "1 MB",
        "5.9 MB",
        "1,000,000 TB",
        "–",
    ]
    assert [duration(s) for s in (0.5, 119, 342.1, 7300, nan)] == ["0.5 s", "119 s", "5 min 42 s", "2 h 1 min", "–"]
    assert [short(v) for v in (0.25, 7, 1234.6, 1e12, inf, nan)] == ["0.25", "7", "1,235", "1e+12", "inf", "–"]
    assert interval([0.5, 0.75]) == "95 %: 0.5000 to 0.7500" and interval(None) == "mean of the peers"
