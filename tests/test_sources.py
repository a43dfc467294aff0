"""Where rows come from: the same rows from any place, a split or a slice of it, one sentence where there are none."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, DatasetDict

from dfl_lora.data.sources import BUILTIN, BUILTINS, column, excerpt, load_rows, peer_path
from dfl_lora.errors import UserError
from tiny import Rows, labelled

TRAIN, HELD = labelled(12), labelled(4, "validation")
Writer = Callable[[Path, Rows], None]
Place = Callable[[Path], Path]


def separated(path: Path, rows: Rows) -> None:
    sign = "\t" if path.suffix == ".tsv" else ","
    Dataset.from_list(rows).to_pandas().to_csv(path, index=False, sep=sign)


def lines(path: Path, rows: Rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


WRITERS: dict[str, Writer] = {
    ".parquet": lambda path, rows: Dataset.from_list(rows).to_parquet(path),
    ".csv": separated,
    ".tsv": separated,
    ".json": lambda path, rows: path.write_text(json.dumps(rows, indent=1)),
    ".jsonl": lines,
    "": lambda path, rows: Dataset.from_list(rows).save_to_disk(str(path)),
}  # fmt: skip


def saved_splits(folder: Path) -> Path:
    splits = {"train": Dataset.from_list(TRAIN), "validation": Dataset.from_list(HELD)}
    DatasetDict(splits).save_to_disk(str(folder / "saved"))
    return folder / "saved"


def files(ending: str) -> Place:
    """Returns a maker of a folder with a file for each split."""

    def make(folder: Path) -> Path:
        (folder / "rows").mkdir()
        WRITERS[ending](folder / "rows" / f"train{ending}", TRAIN)
        WRITERS[ending](folder / "rows" / f"validation{ending}", HELD)
        return folder / "rows"

    return make


SPLITS: dict[str, Place] = {"saved": saved_splits, **{f"folder of {e}": files(e) for e in WRITERS if e}}


def matched(folder: Path) -> Path:
    """Returns splits as MNLI has them: two for validation, of 6 and of 3 rows."""
    tables = {"train": TRAIN, "validation_matched": TRAIN[:6], "validation_mismatched": TRAIN[:3]}
    DatasetDict({name: Dataset.from_list(rows) for name, rows in tables.items()}).save_to_disk(str(folder / "mnli"))
    return folder / "mnli"


@pytest.mark.parametrize("ending", WRITERS)
def test_rows_are_the_same_from_a_file_of_any_kind(ending: str, tmp_path: Path) -> None:
    WRITERS[ending](tmp_path / f"rows{ending}", TRAIN)
    assert load_rows(str(tmp_path / f"rows{ending}"), None, "train").to_list() == TRAIN


@pytest.mark.parametrize("ending", WRITERS)
def test_each_peer_may_have_a_file_of_any_kind(ending: str, tmp_path: Path) -> None:
    template = f"{tmp_path}/client_{{i}}{ending}"
    for i in range(3):
        WRITERS[ending](Path(peer_path(template, i)), TRAIN[4 * i : 4 * i + 4])
    assert [row for i in range(3) for row in load_rows(peer_path(template, i), None, "train").to_list()] == TRAIN


@pytest.mark.parametrize("place", SPLITS.values(), ids=SPLITS)
def test_a_place_with_splits_gives_the_one_asked_for(place: Place, tmp_path: Path) -> None:
    path = str(place(tmp_path))
    assert load_rows(path, None, "train").to_list() == TRAIN
    assert load_rows(path, None, "validation").to_list() == HELD
    with pytest.raises(UserError, match=r"no split 'valid'; it has train, validation. Did you mean 'validation'"):
        load_rows(path, None, "valid")


def test_one_table_is_the_split_train_unless_its_path_is_given_for_other_rows(tmp_path: Path) -> None:
    lines(tmp_path / "rows.jsonl", TRAIN)
    path = str(tmp_path / "rows.jsonl")
    assert len(load_rows(path, None, "train")) == len(load_rows(path, None, "validation", alone=True)) == 12
    assert len(load_rows(path, None, "train[:5]")) == len(load_rows(path, None, "validation[:5]")) == 5
    with pytest.raises(UserError, match=r"is one table of rows, .* has no split 'validation'; .* train\[90%:\]"):
        load_rows(path, None, "validation")


@pytest.mark.parametrize("ending", [ending for ending in WRITERS if ending])
def test_a_folder_with_configurations_gives_the_one_asked_for(ending: str, tmp_path: Path) -> None:
    folder = files(ending)(tmp_path)
    configs = [
        f"- config_name: {n}\n  data_files: [{{split: train, path: {n}{ending}}}]" for n in ("train", "validation")
    ]
    (folder / "README.md").write_text("---\nconfigs:\n" + "\n".join(configs) + "\n---\n")
    assert load_rows(str(folder), "validation", "train").to_list() == HELD
    assert load_rows(str(folder), "train", "train").to_list() == TRAIN
    for config in (None, "other"):
        with pytest.raises(UserError, match="'train', 'validation'"):
            load_rows(str(folder), config, "train")


def test_a_configuration_of_what_has_none_is_an_error(tmp_path: Path) -> None:
    lines(tmp_path / "rows.jsonl", TRAIN)
    for path in (BUILTIN, str(tmp_path / "rows.jsonl")):
        with pytest.raises(UserError, match=r"'sst2' has no effect on '.*', which has none; remove it"):
            load_rows(path, "sst2", "train")


@pytest.mark.parametrize("path", BUILTINS)
def test_what_is_built_in_has_two_splits(path: str) -> None:
    assert (len(load_rows(path, None, "train")), len(load_rows(path, None, "validation"))) == (4000, 500)
    with pytest.raises(UserError, match=r"no split 'test'; it has train, validation"):
        load_rows(path, None, "test")


@pytest.mark.parametrize(
    ("split", "rows"),
    [
        ("train", TRAIN),
        ("train[:5]", TRAIN[:5]),
        ("train[5:]", TRAIN[5:]),
        ("train[-3:]", TRAIN[-3:]),
        ("train[2:4]", TRAIN[2:4]),
        ("train[:1000]", TRAIN),
        ("train[:50%]", TRAIN[:6]),
        ("train[25%:75%]", TRAIN[3:9]),
        ("validation[:1]", HELD[:1]),
    ],
)  # fmt: skip
def test_a_slice_is_those_rows_of_the_split(split: str, rows: Rows, tmp_path: Path) -> None:
    assert load_rows(str(saved_splits(tmp_path)), None, split).to_list() == rows


def test_a_slice_of_a_file_and_of_what_is_built_in(tmp_path: Path) -> None:
    lines(tmp_path / "rows.jsonl", TRAIN)
    assert load_rows(str(tmp_path / "rows.jsonl"), None, "train[3:7]").to_list() == TRAIN[3:7]
    assert load_rows(BUILTIN, None, "train[:7]").to_list() == load_rows(BUILTIN, None, "train").to_list()[:7]


@pytest.mark.parametrize("cut", ["[a:b]", "[]", "[3]", "[:200%]", "[:1e3]", "[:10%:2]", "[::2]"])
def test_a_slice_that_is_none_is_an_error_that_shows_how_one_is_written(cut: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no slice of the 12 rows of '.*'; write such as train\[:1000\]") as refusal:
        load_rows(str(saved_splits(tmp_path)), None, f"train{cut}")
    assert f"'train{cut}'" in str(refusal.value)


@pytest.mark.parametrize("split", ["train[:5", "train]", "[:5]", "train[:5]+train[7:]", "train+validation", ""])
def test_what_is_neither_a_split_nor_a_slice_is_an_error_even_of_one_table(split: str, tmp_path: Path) -> None:
    lines(tmp_path / "rows.jsonl", TRAIN)
    for path in (tmp_path / "rows.jsonl", saved_splits(tmp_path)):
        with pytest.raises(UserError, match="is no split; write a name, or a slice of it such as train"):
            load_rows(str(path), None, split)


@pytest.mark.parametrize("split", ["train[:0]", "train[50:]", "train[7:3]"])
def test_a_slice_without_rows_is_an_error(split: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no rows in 'train\[.*\]'; give"):
        load_rows(str(saved_splits(tmp_path)), None, split)


def test_the_validation_of_mnli_is_the_matched_one(tmp_path: Path) -> None:
    path = str(matched(tmp_path))
    sizes = {"validation": 6, "validation_matched": 6, "validation_mismatched": 3, "validation[:2]": 2}
    sizes["validation_mismatched[:2]"] = 2
    assert {split: len(load_rows(path, None, split)) for split in sizes} == sizes


@pytest.mark.parametrize("split", ["validation_matched", "validation_mismatched[:100]"])
def test_a_validation_that_is_not_there_is_an_error_that_names_what_is(split: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"no split '{split.split('[')[0]}'; it has train, validation"):
        load_rows(str(saved_splits(tmp_path)), None, split)


GIVE = "Give a folder, a .parquet, .csv, .tsv, .json, .jsonl file, a save_to_disk folder, builtin/sentences"
NO_ROWS, NOT_UTF8 = "it has no rows", "its text is not in UTF-8; correct it"
LONG = "its rows have more values than its header has names"
FILES: dict[str, tuple[str, bytes, str]] = {
    "an empty csv": ("a.csv", b"", NO_ROWS),
    "a csv of a header": ("a.csv", b"sentence,label\n", NO_ROWS),
    "an empty tsv": ("a.tsv", b"", NO_ROWS),
    "an empty jsonl": ("a.jsonl", b"", NO_ROWS),
    "an empty list": ("a.json", b"[]", NO_ROWS),
    "an empty parquet": ("a.parquet", b"", "0 bytes; correct it"),
    "a ragged csv": ("a.csv", b"sentence,label\na,1\nb,0,c\n", "Expected 2 fields in line 3, saw 3; correct it"),
    "a ragged tsv": ("a.tsv", b"sentence\tlabel\na\t1\nb\t0\tc\n", "Expected 2 fields in line 3, saw 3; correct it"),
    "a csv of rows longer than the header": ("a.csv", b"sentence,label\nx,a,1\ny,b,0\n", LONG),
    "a csv with an open quotation mark": ("a.csv", b'sentence,label\n"a,1\nb,0\n', "inside string starting at row 1"),
    "a csv in Latin-1": ("a.csv", "sentence,label\ncafé,1\n".encode("latin-1"), NOT_UTF8),
    "a csv in UTF-16": ("a.csv", "sentence,label\na,1\n".encode("utf-16"), NOT_UTF8),
    "a jsonl in UTF-16": ("a.jsonl", '{"sentence": "a"}\n'.encode("utf-16"), NOT_UTF8),
    "a jsonl with a broken line": ("a.jsonl", b'{"label": 1}\n{"label":\n{}\n', "line 2 is not JSON (Expecting"),
    "a jsonl of lists": ("a.jsonl", b"[1, 2]\n[3, 4]\n", "line 1 is JSON, but no object"),
    "a json that is torn": ("a.json", b'[{"label": 1}, {"label": 0}', "at position 27; correct it"),
    "a json of a number": ("a.json", b"3", "correct it"),
    "a parquet that is none": ("a.parquet", b"sentence,label\n", "not a parquet file; correct it"),
    "another ending": ("a.txt", b"a\n", "the ending must be one of .parquet, .csv, .tsv, .json, .jsonl"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # the library's readers leave broken files open
@pytest.mark.parametrize(("name", "content", "says"), FILES.values(), ids=FILES)
def test_a_file_that_cannot_be_read_is_one_sentence(
    name: str, content: bytes, says: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as refusal:
        load_rows(str(tmp_path / name), None, "train")
    assert says in str(refusal.value) and str(tmp_path / name) in str(refusal.value)
    assert "\n" not in str(refusal.value) and capfd.readouterr().err == ""


def test_a_jsonl_in_latin_1_is_an_error_of_the_column(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes('{"sentence": "café", "label": 1}\n'.encode("latin-1"))
    rows = load_rows(str(tmp_path / "rows.jsonl"), None, "train")
    with pytest.raises(UserError, match=r"column 'sentence' of 'here' is not in UTF-8; save it in UTF-8"):
        column(rows, "sentence", "here")


def test_a_byte_order_mark_and_empty_lines_change_nothing(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes(b"\xef\xbb\xbfsentence,label\na,1\n\nb,0\n")
    (tmp_path / "rows.jsonl").write_bytes(
        b'\xef\xbb\xbf{"sentence": "a", "label": 1}\n\n{"sentence": "b", "label": 0}\n'
    )
    for name in ("rows.csv", "rows.jsonl"):
        rows = load_rows(str(tmp_path / name), None, "train").to_list()
        assert rows == [{"sentence": "a", "label": 1}, {"sentence": "b", "label": 0}]


def test_quotation_marks_in_a_tsv_are_text_in_a_file_as_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "train.tsv").write_text('sentence\tlabel\n"an open mark\t1\na "pair" of them\t0\n')
    for path in (tmp_path / "rows", tmp_path / "rows" / "train.tsv"):
        assert load_rows(str(path), None, "train")["sentence"][:] == ['"an open mark', 'a "pair" of them']


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_a_broken_file_in_a_folder_is_one_sentence(tmp_path: Path) -> None:
    folder = files(".csv")(tmp_path)
    (folder / "train.csv").write_text("sentence,label\na,1\nb,0,c\n")
    with pytest.raises(UserError, match="Expected 2 fields in line 3, saw 3; correct it, or give other data"):
        load_rows(str(folder), None, "train")


def empty_saved(folder: Path) -> Path:
    Dataset.from_dict({"sentence": [], "label": []}).save_to_disk(str(folder / "saved"))
    return folder / "saved"


def torn_saved(folder: Path) -> Path:
    (saved_splits(folder) / "dataset_dict.json").write_text("{")
    return folder / "saved"


def empty_folder(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


@pytest.mark.parametrize(
    ("place", "says"),
    [(empty_saved, NO_ROWS), (torn_saved, "Expecting property name"), (empty_folder, "doesn't contain any data files")],
)  # fmt: skip
def test_a_folder_without_rows_is_one_sentence_that_says_what_may_be_given(
    place: Place, says: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as refusal:
        load_rows(str(place(tmp_path)), None, "train")
    assert says in str(refusal.value) and GIVE in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_tilde_in_a_path_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    lines(tmp_path / "train.jsonl", TRAIN)
    assert len(load_rows("~/train.jsonl", None, "train")) == 12


def test_a_name_that_the_hub_does_not_give_is_an_error_that_says_what_may_be_given() -> None:
    with pytest.raises(UserError, match=r"'no/such-rows'.*Give a folder.*builtin/sentences.*network on") as refusal:
        load_rows("no/such-rows", "sst2", "train")
    assert "\n" not in str(refusal.value) and "(config sst2)" in str(refusal.value)


def test_templates_count_peers_from_1() -> None:
    assert peer_path("a/client_{i}/{}.csv", 0) == "a/client_1/1.csv"
    assert peer_path("a/client_{}", 6) == "a/client_7"
    assert peer_path("a/client", 6) == "a/client"


def test_a_column_that_is_not_there_is_an_error_that_names_those_that_are() -> None:
    with pytest.raises(UserError, match=r"no column 'labels'; its columns are sentence, label. Did you mean 'label'"):
        column(Dataset.from_list(TRAIN), "labels", "here")


@pytest.mark.parametrize("ending", [".csv", ".tsv"])
def test_words_that_mean_nothing_to_a_library_of_tables_are_text(ending: str, tmp_path: Path) -> None:
    words = ["None", "NA", "null", "nan", "n/a", "<NA>", "#N/A"]
    WRITERS[ending](tmp_path / f"rows{ending}", [{"sentence": word, "label": word} for word in words])
    rows = load_rows(str(tmp_path / f"rows{ending}"), None, "train")
    assert rows["sentence"][:] == rows["label"][:] == words


@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_a_table_is_read_as_it_is_written_whatever_its_other_rows(ending: str, tmp_path: Path) -> None:
    rows = [row.split(" ") for row in ("words label truth whole gap", "1.50 0 true 7 1", "007 1 false -12 ")]
    text = "".join(("," if ending == "csv" else "\t").join(row) + "\n" for row in rows)
    wanted = {
        "words": ["1.50", "007"],
        "label": [0, 1],
        "truth": ["true", "false"],
        "whole": [7, -12],
        "gap": ["1", None],
    }
    for place in (tmp_path / f"rows.{ending}", tmp_path / "folder" / f"train.{ending}"):
        place.parent.mkdir(exist_ok=True)
        place.write_text(text)
    for path in (tmp_path / f"rows.{ending}", tmp_path / "folder"):
        assert load_rows(str(path), None, "train").to_dict() == wanted


def test_a_row_is_told_by_its_number_in_the_split(tmp_path: Path) -> None:
    rows = [{"sentence": "a", "user": None if i == 7 else f"u{i}"} for i in range(10)]
    lines(tmp_path / "rows.jsonl", rows)
    some = excerpt(str(tmp_path / "rows.jsonl"), None, "train[3:]").select(np.array([0, 2, 4, 5]))
    assert [some.number(row) for row in range(4)] == [3, 5, 7, 8] and some.filled("sentence") == ["a"] * 4
    with pytest.raises(UserError, match=r"Row 7 of '.*rows.jsonl' \(train\[3:\]\) has no value in column 'user'"):
        some.filled("user")
