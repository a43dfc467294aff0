"""How good is what was trained, on rows it has not seen: plain PEFT reads or goes on, and what it says is compared.

a task of GLUE    the label of the largest logit; accuracy and the task's own metric
gsm8k             what is said after a question, as in training; right is who comes to the gold answer's number
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from datasets import get_dataset_config_names
from torch.nn import functional as F

from dfl_lora.data.answers import final_number, gold_number
from dfl_lora.data.batches import Shard, TokenSource, evaluation_batches
from dfl_lora.data.formats import GOLD
from dfl_lora.data.glance import glance
from dfl_lora.data.glue import TASKS, Columns
from dfl_lora.data.places import SAVED
from dfl_lora.data.prompts import question_tokens
from dfl_lora.data.sources import Excerpt, excerpt
from dfl_lora.data.tasks import Tokenization, text_of
from dfl_lora.errors import UserError
from dfl_lora.metrics import METRICS, Answers
from dfl_lora.models.adapters import read_adapter
from dfl_lora.models.base import Files, load_encoder, load_tokenizer, max_tokens
from dfl_lora.models.generation import Said, Sampling, generate, load_causal
from dfl_lora.models.plain import device_here, worn_in_turn
from dfl_lora.recipe import GSM8K, is_path
from dfl_lora.trained import CONSENSUS, Trained

HEADS = ("classifier.weight", "classifier.out_proj.weight")
"""How the last layer of a classifier is called."""
CONFIGS = ("main",)
"""Configurations that are taken where none has the name of the task."""
MAX_LENGTH = 512
Line = dict[str, Any]
Progress = Callable[[str, int, int], None]
"""Is told whose adapter it is, how many rows are done, and of how many."""
Hear = Callable[[Line], None]
"""Is told each answer as it comes."""


@dataclass(frozen=True)
class Asked:
    """Rows to be evaluated on, by what was typed; None where it was not."""

    task: str
    path: str | None = None
    config: str | None = None
    split: str | None = None
    limit: int | None = None


@dataclass(frozen=True)
class Result:
    """What came out: the metrics of each adapter by name."""

    task: str
    metric: str
    num_rows: int
    scores: Mapping[str, Mapping[str, float]]
    notes: Sequence[str] = ()
    """What one should know of how it came out."""

    @property
    def metrics(self) -> list[str]:
        """The names of the metrics: accuracy, and the task's own where that is another."""
        return list(dict.fromkeys(("accuracy", self.metric)))

    def spread(self, metric: str) -> Line:
        """Returns a metric over the peers, or over the consensus where there is no other, and of each of them."""
        every = {whose: values[metric] for whose, values in self.scores.items()}
        each = {whose: value for whose, value in every.items() if whose != CONSENSUS}
        values = list((each or every).values())
        over = {"mean": fmean(values), "min": min(values), "max": max(values)}
        return {**over, "per_peer": each, "consensus": every.get(CONSENSUS)}

    def as_json(self) -> Line:
        spreads = {metric: self.spread(metric) for metric in self.metrics}
        return {"task": self.task, "metric": self.metric, "rows": self.num_rows, **spreads, "notes": list(self.notes)}


def evaluate(
    trained: Trained,
    asked: Asked,
    sampling: Sampling,
    batch_size: int,
    progress: Progress = lambda *_: None,
    hear: Hear = lambda _: None,
) -> Result:
    """Returns how good every adapter is on the rows that are asked for."""
    if trained.causal and asked.task != GSM8K:
        raise UserError(
            f"{trained.place} goes on texts and tells no labels, so it cannot be evaluated on {asked.task}; "
            f"use --task {GSM8K}."
        )
    if not trained.causal and asked.task == GSM8K:
        raise UserError(
            f"{trained.place} tells labels and writes no answers, so it cannot be evaluated on {GSM8K}; "
            f"use --task with one of {', '.join(TASKS)}."
        )
    table = load(trained, asked)
    if trained.causal:
        return answered(trained, table, sampling, batch_size, progress, hear)
    return labelled(trained, asked.task, table, batch_size, progress)


def load(trained: Trained, asked: Asked) -> Excerpt:
    """Returns the rows that are asked for; where no place is told, the run's own."""
    path, config, split, alone = asked.path, asked.config, asked.split, True
    if path is None:
        path, config, split, alone = own_place(trained, asked)
    split = split or ("test" if asked.task == GSM8K else "validation")
    config = config or config_for(path, asked.task)
    glance(path, config, split)
    found = excerpt(path, config, split, alone=alone)
    return found if asked.limit is None else found.select(np.arange(min(asked.limit, len(found.rows))))


def own_place(trained: Trained, asked: Asked) -> tuple[str, str | None, str | None, bool]:
    """Returns path, configuration and split of a run's own rows, and whether the path is of these rows alone."""
    recipe = trained.recipe
    if recipe is not None and recipe.task.name == asked.task:
        data, held_out = recipe.data, recipe.data.validation
        if is_path(held_out) and "{" not in held_out:
            return held_out, asked.config, asked.split, True
        if data.path is not None and not is_path(held_out):
            return data.path, asked.config or data.config, asked.split or held_out, False
    raise UserError(f"{trained.place} does not say where rows of {asked.task} are; give their place with --data.")


def config_for(path: str, task: str) -> str | None:
    """Returns which configuration of a folder has the rows of a task; None where it has no several."""
    place = Path(path).expanduser()
    if not place.is_dir() or any((place / name).is_file() for name in SAVED):
        return None
    try:
        there = get_dataset_config_names(str(place))
    except Exception:  # loaders raise many kinds; what is wrong is said when the rows are loaded
        return None
    found = next((name for name in (task, *CONFIGS) if name in there), None)
    if len(there) > 1 and found is None:
        raise UserError(f"'{path}' has the configurations {', '.join(there)}; name one of them with --config.")
    return found if len(there) > 1 else None


def answered(
    trained: Trained, table: Excerpt, sampling: Sampling, batch_size: int, progress: Progress, hear: Hear
) -> Result:
    """Asks every adapter the questions of GSM8K."""
    questions, golds = text_of(table.rows, "question", table.path), gold_numbers(table)
    files = trained.files()
    tokenizer = trained.tokenizer(files)
    prompts = [question_tokens(tokenizer, question) for question in questions]
    scores, lines, said = dict[str, dict[str, float]](), list[Line](), list[Said]()
    for whose, model in worn_in_turn(load_causal(files), files, trained.adapters):
        own = list[Line]()

        def heard(row: int, answer: Said, whose: str = whose, own: list[Line] = own) -> None:
            number, gold = final_number(answer.text), golds[row]
            line = {"whose": whose, "row": row, "question": questions[row], "generated": answer.text}
            own.append({**line, "number": number, "gold": gold, "right": number == gold})
            hear(own[-1])
            progress(whose, len(own), len(prompts))

        said += generate(model, tokenizer, prompts, sampling, batch_size, heard)
        scores[whose] = {"accuracy": fmean(line["right"] for line in own)}
        lines += own
    return Result(GSM8K, "accuracy", len(prompts), scores, notes_of(said, lines, sampling))


def gold_numbers(table: Excerpt) -> list[str]:
    """Returns the numbers of the gold answers; raises with the first row that has none."""
    numbers = []
    for row, answer in enumerate(text_of(table.rows, "answer", table.path)):
        number = gold_number(answer)
        if number is None:
            raise UserError(
                f"Row {table.number(row)} of {table.where} has no number after {GOLD} in column 'answer'; correct or "
                "remove it."
            )
        numbers.append(number)
    return numbers


def notes_of(said: Sequence[Said], lines: Sequence[Line], sampling: Sampling) -> list[str]:
    """Returns what one should know of answers: how many lost the beginning of their question, or came to no end."""
    count = f"of {len(said):,} answers"
    cut, endless = sum(one.cut for one in said), sum(not one.ended for one in said)
    without = sum(line["number"] is None for line in lines)
    notes = {
        f"{cut:,} {count} are to questions too long for the model, whose beginning was left out": cut,
        f"{endless:,} {count} had come to no end after {sampling.max_new_tokens} tokens": endless,
        f"{without:,} {count} have no number": without,
    }
    return [note for note, number in notes.items() if number]


def progress_of(progress: Progress, whose: str, num_rows: int) -> Callable[[int], None]:
    return lambda done: progress(whose, done, num_rows)


def labelled(trained: Trained, task: str, table: Excerpt, batch_size: int, progress: Progress) -> Result:
    """Lets every adapter tell the labels of the rows of a task of GLUE."""
    columns, metric, files = columns_of(trained, task), TASKS[task].metric, trained.files()
    names = columns.names or ()
    order = order_of(trained, task, names, num_labels_of(trained))
    source = tokenized(trained, files, columns, table)
    base = load_encoder(files, len(order), "sdpa", torch.float32, seed=0).model.to(device_here())
    scores = {}
    for whose, model in worn_in_turn(base, files, trained.adapters):
        told = progress_of(progress, whose, len(table.rows))
        answers = read(model, source, order, batch_size, told)
        scores[whose] = {name: METRICS[name](answers) for name in dict.fromkeys(("accuracy", metric))}
    return Result(task, metric, len(table.rows), scores)


def columns_of(trained: Trained, task: str) -> Columns:
    """Returns the columns of a task, with the label column of a run that learnt it."""
    recipe = trained.recipe
    own = recipe is not None and recipe.task.name == task
    return replace(TASKS[task], label=recipe.task.label) if recipe is not None and own else TASKS[task]


def num_labels_of(trained: Trained) -> int:
    """Returns how many labels a classifier tells apart."""
    if trained.labels is not None:
        return len(trained.labels)
    adapter = next(iter(trained.adapters.values()))
    tensors = read_adapter(adapter)[1] if adapter is not None else {}
    sizes = [len(tensor) for name, tensor in tensors.items() if name.endswith(HEADS)]
    if not sizes:
        raise UserError(f"{trained.place} holds no classifier, so it does not tell labels; give one that does.")
    return sizes[0]


def order_of(trained: Trained, task: str, names: Sequence[str], num_labels: int) -> list[int]:
    """Returns, for each label of a task, its number in the classifier; raises where they have other labels."""
    own = list(trained.labels or ())
    if num_labels == len(names) and set(own) == set(names):
        return [own.index(name) for name in names]
    nameless = all(name.removeprefix("LABEL_").isdecimal() for name in own)
    if num_labels == len(names) and nameless:
        return list(range(num_labels))
    told = f"the labels {', '.join(own)}" if own and not nameless else f"{num_labels} labels"
    raise UserError(f"{trained.place} tells {told}, and {task} has {', '.join(names)}; evaluate it on its own task.")


def tokenized(trained: Trained, files: Files, columns: Columns, table: Excerpt) -> TokenSource:
    """Returns the rows as tokens, cut as in training where that is known."""
    task = trained.recipe.task if trained.recipe is not None else None
    length, side = (task.max_length, task.truncation_side) if task is not None else (MAX_LENGTH, "right")
    how = Tokenization(load_tokenizer(files), files.tokenizer, min(length, max_tokens(files)), side)
    return how.source(table.rows, columns, columns.names or (), table.path)


@torch.inference_mode()
def read(
    model: Any, source: TokenSource, order: Sequence[int], batch_size: int, progress: Callable[[int], None]
) -> Answers:
    """Returns the labels that a classifier gives the rows, numbered as the task numbers them."""
    device, answers, done = device_here(), list[Answers](), 0
    for batch in evaluation_batches(Shard(source, np.arange(len(source.lengths))), batch_size):
        inputs = {name: values.to(device) for name, values in batch.padded().items()}
        logits = model(**inputs).logits.float().cpu()[:, list(order)]  # [rows, labels]
        loss = F.cross_entropy(logits, batch.labels).item()
        answers.append(Answers(batch.labels.numpy(), logits.argmax(1).numpy(), loss, len(order)))
        done += len(batch.labels)
        progress(done)
    return Answers.pooled(answers)
