"""`dfl-lora eval` and `dfl-lora chat`: what was trained is used, and what cannot be is refused in a sentence."""

import csv
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import LlamaForCausalLM, pipeline

from dfl_lora.data.answers import final_number
from dfl_lora.data.prompts import question_tokens, text_tokens, turns_tokens
from dfl_lora.errors import UserError
from dfl_lora.evaluating import config_for, order_of
from dfl_lora.models import generation
from dfl_lora.models.base import load_tokenizer, locate, quiet
from dfl_lora.models.generation import Sampling, generate, load_causal
from dfl_lora.trained import Trained
from real import real
from speaking import ROWS, TEMPLATE, write_adapter, write_llama, write_questions, write_run
from tiny import ONE_THREAD, call, files_of, written

NEW = 24
SHORT = ("--max-new-tokens", NEW)


@dataclass(frozen=True)
class Ground:
    """A base, questions whose first two gold answers are what the consensus says, and a run on both."""

    base: Path
    data: Path
    run: Path

    @property
    def gsm8k(self) -> tuple[object, ...]:
        return ("--task", "gsm8k", *SHORT)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    folder = tmp_path_factory.mktemp("spoken")
    base = write_llama(folder / "tiny-llama")
    numbers = [final_number(text) for text in said(base, None)]
    assert None not in numbers[:2]
    rows = [
        row | ({"answer": f"So it is\n#### {number}"} if k < 2 else {"answer": "It is\n#### -7.125"})
        for k, (row, number) in enumerate(zip(ROWS, numbers, strict=True))
    ]
    data = folder / "questions"
    write_questions(data / "train.jsonl", ROWS)
    write_questions(data / "test.jsonl", rows)
    return Ground(base, data, write_run(folder / "run", base, data))


@pytest.fixture
def ground(built: Ground, tmp_path: Path) -> Ground:
    """A ground whose run may be changed."""
    run = shutil.copytree(built.run, tmp_path / "run")
    return Ground(built.base, built.data, run)


def said(base: Path, adapter: Path | None, rows: list[dict[str, str]] = ROWS) -> list[str]:
    """Returns what a base with an adapter says after questions, one by one with plain PEFT."""
    tokenizer, answers = load_tokenizer(locate(str(base))), []
    with quiet():
        model: Any = LlamaForCausalLM.from_pretrained(base)
        model = model if adapter is None else PeftModel.from_pretrained(model, adapter)
    for row in rows:
        tokens = torch.tensor([question_tokens(tokenizer, row["question"])])
        new = model.generate(input_ids=tokens, max_new_tokens=NEW, do_sample=False, pad_token_id=257)
        answers.append(tokenizer.decode(new[0, tokens.shape[1] :], skip_special_tokens=True))
    return answers


def result_of(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    capsys.readouterr()
    assert call("eval", *words, "--json") == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_every_adapter_of_a_run_is_asked_and_what_plain_peft_says_is_counted(
    ground: Ground, capsys: pytest.CaptureFixture[str]
) -> None:
    result = result_of(capsys, ground.run, *ground.gsm8k, "--batch-size", 3)
    lines = [json.loads(line) for line in (ground.run / "answers-gsm8k.jsonl").read_text().splitlines()]
    assert (result["task"], result["metric"], result["rows"]) == ("gsm8k", "accuracy", len(ROWS))
    assert [line["whose"] for line in lines] == [n for n in ("peer-000", "peer-001", "consensus") for _ in ROWS]
    rows = [json.loads(line) for line in (ground.data / "test.jsonl").read_text().splitlines()]
    accuracy = result["accuracy"]
    for whose, own in {**accuracy["per_peer"], "consensus": accuracy["consensus"]}.items():
        mine = sorted((line for line in lines if line["whose"] == whose), key=lambda line: line["row"])
        assert [line["generated"] for line in mine] == said(ground.base, ground.run / "adapters" / whose)
        assert [line["question"] for line in mine] == [row["question"] for row in rows]
        assert [line["number"] for line in mine] == [final_number(line["generated"]) for line in mine]
        assert all(line["right"] == (line["number"] == line["gold"]) for line in mine)
        assert own == sum(line["right"] for line in mine) / len(mine)
    assert accuracy["consensus"] == 2 / 5 and accuracy["per_peer"].keys() == {"peer-000", "peer-001"}
    own = list(accuracy["per_peer"].values())
    assert (accuracy["mean"], accuracy["min"], accuracy["max"]) == (sum(own) / 2, min(own), max(own))


def test_a_table_has_a_row_for_each_adapter_and_the_spread_over_peers(
    ground: Ground, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("eval", ground.run, *ground.gsm8k, "--limit", 2, "--to", tmp_path / "said.jsonl") == 0
    shown = capsys.readouterr().out
    for name in ("gsm8k, 2 rows", "peer-000", "peer-001", "consensus", "mean over peers", "said.jsonl"):
        assert name in shown
    assert len((tmp_path / "said.jsonl").read_text().splitlines()) == 6
    assert not (ground.run / "answers-gsm8k.jsonl").exists()


def test_answers_that_are_there_are_left_alone_and_those_of_a_folder_are_written_here(
    ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    adapter, words = ground.run / "adapters" / "consensus", (*ground.gsm8k, "--limit", 1)
    result_of(capsys, ground.run, *words, "--peer", 0)
    before = files_of(ground.run)
    (ground.run / "answers-gsm8k-3.jsonl").symlink_to("nowhere")
    assert result_of(capsys, ground.run, *words, "--peer", 1)["answers"] == str(ground.run / "answers-gsm8k-2.jsonl")
    assert result_of(capsys, ground.run, *words, "--peer", 1)["answers"] == str(ground.run / "answers-gsm8k-4.jsonl")
    for name in ("answers-gsm8k-3.jsonl", "answers-gsm8k-4.jsonl"):
        (ground.run / name).unlink()
    after = files_of(ground.run)
    assert {**before, "answers-gsm8k-2.jsonl": after["answers-gsm8k-2.jsonl"]} == after
    assert call("eval", adapter, *words) == 0 and call("eval", adapter, *words) == 0
    assert "wrote answers-gsm8k-2.jsonl" in capsys.readouterr().out
    assert (tmp_path / "answers-gsm8k.jsonl").read_text() == (tmp_path / "answers-gsm8k-2.jsonl").read_text()
    assert files_of(ground.run) == after


def test_an_evaluation_that_is_stopped_keeps_what_was_said_and_one_that_is_refused_leaves_nothing(
    ground: Ground, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("eval", ground.run, "--task", "gsm8k", "--max-new-tokens", 400) == 2
    assert not (ground.run / "answers-gsm8k.jsonl").exists()
    real, passes = generation.continued, list[object]()

    def stopped(*given: Any) -> Any:
        passes.append(given)
        if len(passes) == 3:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(generation, "continued", stopped)
    assert call("eval", ground.run, *ground.gsm8k, "--batch-size", 1) == 130
    assert f"the 2 answers so far are in {ground.run / 'answers-gsm8k.jsonl'}" in capsys.readouterr().err
    assert len((ground.run / "answers-gsm8k.jsonl").read_text().splitlines()) == 2


def test_adapters_of_a_run_are_chosen(ground: Ground, capsys: pytest.CaptureFixture[str]) -> None:
    one = result_of(capsys, ground.run, *ground.gsm8k, "--peer", 1)["accuracy"]
    assert one["per_peer"].keys() == {"peer-001"} and one["consensus"] is None
    agreed = result_of(capsys, ground.run, *ground.gsm8k, "--consensus")["accuracy"]
    assert agreed["per_peer"] == {} and agreed["consensus"] == agreed["mean"] == 2 / 5


def test_an_adapter_apart_from_its_run_and_a_merged_model_say_the_same(
    ground: Ground, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("export", ground.run, "--peer", 0, "--to", tmp_path / "adapter") == 0
    assert call("export", ground.run, "--peer", 0, "--merge", "--to", tmp_path / "model") == 0
    places = {
        "run": (ground.run, "--peer", 0),
        "inside": (ground.run / "adapters" / "peer-000",),
        "adapter": (tmp_path / "adapter", "--base", ground.base, "--data", ground.data),
        "model": (tmp_path / "model", "--data", ground.data / "test.jsonl"),
    }
    texts = {}
    for name, words in places.items():
        to = tmp_path / f"{name}.jsonl"
        result_of(capsys, *words, *ground.gsm8k, "--to", to)
        texts[name] = [json.loads(line)["generated"] for line in to.read_text().splitlines()]
    assert texts["run"] == texts["inside"] == texts["adapter"] == texts["model"]
    assert len(texts["run"]) == len(ROWS)


def test_an_adapter_is_merged_into_a_base_that_lies_elsewhere_now(
    ground: Ground, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = shutil.copytree(ground.base, tmp_path / "moved")
    recipe = ground.run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(ground.base), str(tmp_path / "gone")))
    words = ("export", ground.run, "--peer", 0, "--to", tmp_path / "model")
    assert call(*words, "--merge") == 2
    assert "give a folder that holds it with --base" in capsys.readouterr().err
    assert call(*words, "--base", moved) == 2
    assert "--base has no effect without --merge" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()
    assert call(*words, "--merge", "--base", moved) == 0
    assert said(tmp_path / "model", None) == said(ground.base, ground.run / "adapters" / "peer-000")


def test_adapters_of_a_real_run_that_brought_words_are_asked_with_them(
    built: Ground, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = yaml.safe_load((built.run / "recipe.yaml").read_text())
    recipe["task"]["tokens"] = "seed"
    recipe["train"] = {"rounds": 1, "local": {"steps": 1}, "batch_size": 2}
    recipe["compute"] = ONE_THREAD
    assert call("run", written(tmp_path / "recipe.yaml", recipe), "--out", tmp_path / "run", "--json") == 0
    assert (tmp_path / "run" / "adapters" / "peer-001" / "tokenizer.json").is_file()
    assert call("export", tmp_path / "run", "--peer", 1, "--merge", "--to", tmp_path / "model") == 0
    result = result_of(capsys, tmp_path / "run", "--task", "gsm8k", *SHORT, "--peer", 1)
    lines = [json.loads(line) for line in (tmp_path / "run" / "answers-gsm8k.jsonl").read_text().splitlines()]
    assert [line["generated"] for line in sorted(lines, key=lambda line: line["row"])] == said(tmp_path / "model", None)
    assert result["rows"] == len(ROWS) and result["accuracy"]["per_peer"].keys() == {"peer-001"}


def test_a_classifier_tells_the_labels_that_its_run_counted(
    text_run: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files_of(text_run)
    result = result_of(capsys, text_run, "--task", "sst2", "--data", rows / "validation.csv")
    summary = json.loads((text_run / "summary.json").read_text())["accuracy"]
    assert list(result["accuracy"]["per_peer"].values()) == summary["per_peer"]
    assert result["accuracy"]["consensus"] == summary["consensus"] and result["rows"] == 12
    assert files_of(text_run) == before
    assert call("export", text_run, "--peer", 1, "--merge", "--to", tmp_path / "model") == 0
    merged = result_of(capsys, tmp_path / "model", "--task", "sst2", "--data", rows / "validation.csv")
    assert merged["accuracy"]["per_peer"] == {"model": summary["per_peer"][1]}
    table = list(csv.DictReader((rows / "validation.csv").open()))[:7]
    with quiet():
        plain = pipeline("text-classification", str(tmp_path / "model"), device="cpu")
    right = [plain(row["sentence"], truncation=True)[0]["label"] == row["label"] for row in table]
    for words, whose in (((text_run, "--peer", 1), "peer-001"), ((tmp_path / "model",), "model")):
        few = result_of(capsys, *words, "--task", "sst2", "--data", rows / "validation.csv", "--limit", 7)
        assert few["accuracy"]["per_peer"] == {whose: sum(right) / 7}
    own = result_of(capsys, text_run, "--task", "cola", "--data", rows / "validation.csv", "--limit", 9)
    assert own["metric"] == "matthews" and own["rows"] == 9 and own["matthews"].keys() == own["accuracy"].keys()


@pytest.mark.parametrize(("own", "order"), [
    (("negative", "positive"), [0, 1]), (("positive", "negative"), [1, 0]), (("0", "1"), [0, 1]),
    (("LABEL_0", "LABEL_1"), [0, 1]), (None, [0, 1]),
])  # fmt: skip
def test_labels_are_matched_by_their_names_where_they_have_some(own: tuple[str, ...] | None, order: list[int]) -> None:
    trained = Trained(Path("here"), {"here": None}, "here", None, False, own, None)
    assert order_of(trained, "sst2", ("negative", "positive"), 2) == order
    with pytest.raises(UserError, match="qnli has entailment, not_entailment"):
        order_of(replace(trained, labels=("good", "bad")), "qnli", ("entailment", "not_entailment"), 2)


def test_of_real_data_with_several_configurations_that_of_the_task_is_taken(
    text_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gsm8k, glue = real("gsm8k", "glue")
    assert config_for(str(gsm8k), "gsm8k") is None
    result = result_of(capsys, text_run, "--task", "sst2", "--data", glue, "--consensus", "--limit", 40)
    assert result["rows"] == 40 and 0 < result["accuracy"]["consensus"] < 1
    assert call("eval", text_run, "--task", "rte", "--data", glue) == 2
    said = capsys.readouterr().err
    assert "has the configurations sst2, qnli, mnli" in said and "--config" in said


Words = Callable[[Ground, Path], list[object]]


def with_rows(rows: list[dict[str, str]]) -> Words:
    return lambda g, here: ["eval", g.run, "--task", "gsm8k", "--data", write_questions(here / "rows.jsonl", rows)]


def without_adapters(run: Path, here: Path) -> Path:
    """Returns a copy of a run that has not ended."""
    return shutil.copytree(run, here / "begun", ignore=shutil.ignore_patterns("adapters"))


def shallower(base: Path, to: Path) -> Path:
    """Returns a copy of a base whose config names a layer less than its weights have."""
    config = shutil.copytree(base, to) / "config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps(content | {"num_hidden_layers": content["num_hidden_layers"] - 1}))
    return to


LAST_BARE = [{"question": "a", "answer": answer} for answer in ("#### 0", "#### 1", "#### 2", "3")]
BAD: dict[str, tuple[Words, tuple[str, ...]]] = {
    "a task misspelt": (lambda g, _: ["eval", g.run, "--task", "gsm8"], ("--task is 'gsm8'", "Did you mean 'gsm8k'")),
    "a decoder that is to tell labels": (
        lambda g, _: ["eval", g.run, "--task", "sst2"], ("no labels", "sst2", "--task gsm8k"),
    ),
    "no folder": (lambda g, here: ["eval", here / "none", "--task", "gsm8k"], ("no folder", "none")),
    "a folder of something else": (
        lambda g, here: ["eval", g.data, "--task", "gsm8k"], ("no run directory", "adapter_config.json"),
    ),
    "no such peer": (
        lambda g, _: ["eval", g.run, "--task", "gsm8k", "--peer", 2], ("no adapter peer-002", "peer-000, peer-001"),
    ),
    "a run without adapters": (
        lambda g, here: ["eval", without_adapters(g.run, here), "--task", "gsm8k"], ("no adapters yet",),
    ),
    "another base": (
        lambda g, here: ["eval", g.run, "--task", "gsm8k", "--base", write_llama(here / "other", seed=5)],
        ("was trained on tiny-llama", "other has"),
    ),
    "a base whose config is another's": (
        lambda g, here: ["eval", g.run, "--task", "gsm8k", "--base", shallower(g.base, here / "shallow")],
        ("does not fit", "config.json"),
    ),
    "a base that is not here": (
        lambda g, here: [
            "eval", write_adapter(here / "adapter", g.base, 1), "--task", "gsm8k", "--data", g.data / "test.jsonl"
        ],
        ("tiny-llama, is not here", "--base"),
    ),
    "no place of rows": (
        lambda g, here: ["eval", write_adapter(here / "adapter", g.base, 1), "--task", "gsm8k"], ("--data",),
    ),
    "rows that are not there": (
        lambda g, here: ["eval", g.run, "--task", "gsm8k", "--data", here / "none.jsonl"], ("none.jsonl", "no such"),
    ),
    "no rows": (with_rows([]), ("no rows",)),
    "a missing column": (with_rows([{"text": "a", "answer": "#### 1"}]), ("no column 'question'", "text, answer")),
    "an answer without a number": (with_rows([{"question": "a", "answer": "1"}]), ("Row 0", "no number after ####")),
    "an answer without a number in a slice": (
        lambda g, here: [*with_rows(LAST_BARE)(g, here), "--split", "test[2:]"],
        ("Row 3 of", "(test[2:]) has no number after ####"),
    ),
    "a split that is not there": (
        lambda g, _: ["eval", g.run, "--task", "gsm8k", "--split", "tset"], ("no split 'tset'", "test"),
    ),
    "no room": (
        lambda g, _: ["eval", g.run, "--task", "gsm8k", "--max-new-tokens", 400], ("--max-new-tokens 400", "no room"),
    ),
    "a peer of an adapter": (
        lambda g, _: ["eval", g.run / "adapters" / "consensus", "--task", "gsm8k", "--peer", 0], ("one adapter",),
    ),
    "a base of a model": (
        lambda g, _: ["eval", g.base, "--task", "gsm8k", "--base", g.base], ("--base has no effect", "whole model"),
    ),
    "a file that exists": (
        lambda g, _: ["eval", g.run, "--task", "gsm8k", "--to", g.data / "test.jsonl"], ("exists", "--to"),
    ),
    "drawing labels": (lambda g, _: ["eval", g.run, "--task", "sst2", "--sample"], ("--sample has no effect",)),
    "chat with several": (lambda g, _: ["chat", g.run, "--prompt", "a"], ("choose one", "--consensus")),
    "chat with two": (
        lambda g, _: ["chat", g.run, "--peer", 0, "--consensus", "--prompt", "a"], ("one of --peer K and --consensus",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_is_told_in_one_sentence(
    name: str, ground: Ground, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, needed = BAD[name]
    command = words(ground, tmp_path)
    before = files_of(tmp_path)
    capsys.readouterr()
    assert call(*command) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("dfl-lora: ") and err.count("\n") == 1 and "Traceback" not in err
    for part in needed:
        assert part in err
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("verb", ["eval", "chat"])
def test_a_classifier_and_the_toy_write_no_texts(
    verb: str, text_run: Path, toy_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--task", "gsm8k") if verb == "eval" else ("--prompt", "a")
    assert call(verb, text_run, *words) == 2
    assert "tells labels and writes no" in capsys.readouterr().err
    assert call(verb, text_run / "adapters" / "consensus", *words) == 2
    assert "tells labels and writes no" in capsys.readouterr().err
    assert call(verb, toy_run, *words) == 2
    assert "is a run of the toy, which has no adapters" in capsys.readouterr().err


def test_a_classifier_of_other_labels_is_refused(text_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("eval", text_run, "--task", "mnli", "--data", "builtin/pairs") == 2
    assert "tells 2 labels, and mnli has entailment, neutral, contradiction" in capsys.readouterr().err


def reply(base: Path, adapter: Path | None, tokens: list[int]) -> str:
    files = locate(str(base))
    (one,) = generate(load_causal(files, adapter), load_tokenizer(files), [tokens], Sampling(max_new_tokens=NEW))
    return one.text


def test_one_prompt_has_one_answer(ground: Ground, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = text_tokens(load_tokenizer(locate(str(ground.base))), "Hello")
    for words, name in ((("--peer", 1), "peer-001"), (("--consensus",), "consensus")):
        assert call("chat", ground.run, *words, *SHORT, "--prompt", "Hello") == 0
        said = capsys.readouterr()
        assert said.out == f"{reply(ground.base, ground.run / 'adapters' / name, tokens)}\n" and said.err == ""


def test_what_is_not_in_utf_8_is_refused(ground: Ground, capsys: pytest.CaptureFixture[str]) -> None:
    typed = b"a\xff".decode(errors="surrogateescape")  # as the words of a command and its input are read
    assert call("chat", ground.run, "--consensus", *SHORT, "--prompt", typed) == 2
    assert capsys.readouterr().err == "dfl-lora: What was typed is not in UTF-8; type it in UTF-8.\n"


def test_an_adapter_of_plain_peft_is_taken(ground: Ground, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = ground.run / "adapters" / "peer-001"
    assert call("chat", adapter, "--base", ground.base, *SHORT, "--prompt", "Hello") == 0
    own = capsys.readouterr().out
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"auto_mapping": None}))
    assert call("chat", adapter, "--base", ground.base, *SHORT, "--prompt", "Hello") == 0
    assert capsys.readouterr().out == own


def test_a_run_is_asked_the_questions_that_it_held_out(ground: Ground, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = ground.run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("validation: test", "validation: 'test[1:3]'"))
    assert result_of(capsys, ground.run, *ground.gsm8k, "--consensus")["rows"] == 2


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_a_conversation_ends_at_an_empty_line_and_is_read_again_where_a_template_tells_who_speaks(
    template: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write_llama(tmp_path / "base", template=template)
    tokenizer = load_tokenizer(locate(str(base)))
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\nAnd then?\n\nnever read\n"))
    assert call("chat", base, *SHORT) == 0
    turns = [{"role": "user", "content": "Hello"}]
    first = reply(base, None, turns_tokens(tokenizer, turns))
    turns += [{"role": "assistant", "content": first}, {"role": "user", "content": "And then?"}]
    assert capsys.readouterr().out == f"{first}\n{reply(base, None, turns_tokens(tokenizer, turns))}\n"
