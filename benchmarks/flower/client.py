"""A peer in Flower: local steps with plain PEFT, and an evaluation of the mixed adapter.

Ray's workers import this file instead of unpickling it, so what it caches lives as long as its worker. What a peer
keeps between its calls (Adam's moments, tensors it does not share) is in its `context.state`: any worker may serve it.
"""

import json
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NotRequired, TypedDict

import torch
import transformers
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.functional import cross_entropy

MOMENTS = ("step", "exp_avg", "exp_avg_sq")
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class Job(TypedDict):
    """What job.json holds."""

    model: str  # a folder
    num_labels: int
    r: int
    lora_alpha: float
    target_modules: list[str]
    learning_rates: list[list[float]]  # [rounds][steps]
    rounds: int
    steps: int
    num_peers: int
    W: list[list[float]]
    train_a: bool
    shared_head: bool
    dtype: str  # of the frozen base: float32 or bfloat16
    attention: str  # sdpa or eager
    threads: int
    mode: str  # tuned or template
    actors: NotRequired[int]  # tuned alone: one a thread where it is left out


@dataclass(frozen=True)
class Names:
    """The job's tensors: all of them, those a peer trains, those it sends to its neighbours."""

    all: list[str]
    trained: list[str]
    shared: list[str]


@cache
def job_in(directory: str) -> Job:
    job: Job = json.loads((Path(directory) / "job.json").read_text())
    return job


@cache
def names_in(directory: str) -> Names:
    """Returns the names in start.safetensors: MODULE.A, MODULE.B, and the head's by their names in the model."""
    job = job_in(directory)
    with safe_open(Path(directory) / "start.safetensors", "np") as start:
        keys = start.keys()
    names = sorted({re.sub(r"^peer\d+/", "", key) for key in keys})
    trained = [name for name in names if job["train_a"] or not name.endswith(".A")]
    return Names(names, trained, [name for name in trained if job["shared_head"] or name.endswith((".A", ".B"))])


@dataclass(frozen=True)
class Adapted:
    """A base model with one adapter, and the job's tensors in it by name."""

    model: Module
    tensors: dict[str, Parameter]

    def logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        logits: Tensor = self.model(**{key: batch[key] for key in INPUTS if key in batch}).logits.float()
        return logits


def load(directory: str) -> Adapted:
    """Returns the job's base model, frozen in the job's dtype, with LoRA and head in float32, without dropout."""
    job, names = job_in(directory), names_in(directory)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        job["model"],
        num_labels=job["num_labels"],
        dtype=getattr(torch, job["dtype"]),
        attn_implementation=job["attention"],
    )
    lora = LoraConfig(
        task_type=None, r=job["r"], lora_alpha=job["lora_alpha"], target_modules=job["target_modules"], lora_dropout=0.0
    )
    model = get_peft_model(base, lora).eval()
    found = {job_name(path): (path, parameter) for path, parameter in model.named_parameters()}
    adapters, wanted = {name for name in found if name.endswith((".A", ".B"))}, set(names.all)
    if wrong := (wanted - found.keys()) | (adapters - wanted):
        raise ValueError(f"start.safetensors and target_modules do not name the same tensors: {sorted(wrong)}")
    for name, (_, parameter) in found.items():
        parameter.requires_grad_(name in names.trained)
    for path, parameter in (found[name] for name in wanted - adapters):
        parameter.data = parameter.data.float()
        model.get_submodule(path.rpartition(".")[0]).register_forward_pre_hook(in_float32)
    return Adapted(model, {name: found[name][1] for name in names.all})


def in_float32(_: Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A head in float32 takes what a base in bfloat16 gives it."""
    return tuple(x.float() for x in inputs)


def job_name(name: str) -> str:
    """Returns the job's name of a parameter of a PEFT model."""
    name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    return re.sub(r"\.lora_([AB])\.default\.weight$", r".\1", name)


cached_load = cache(load)


@cache
def data_in(directory: str) -> safe_open:
    return safe_open(Path(directory) / "data.safetensors", "pt")


@cache
def fields_in(directory: str) -> dict[str, list[str]]:
    """Returns the fields of every batch: `peer0/round1/step0` -> input_ids, labels, ..."""
    fields: dict[str, list[str]] = {}
    keys = data_in(directory).keys()
    for key in keys:
        batch, _, field = key.rpartition("/")
        fields.setdefault(batch, []).append(field)
    return fields


def batch_of(directory: str, batch: str) -> dict[str, Tensor]:
    return {field: data_in(directory).get_tensor(f"{batch}/{field}") for field in fields_in(directory)[batch]}


def validation(directory: str) -> Iterator[dict[str, Tensor]]:
    return (batch_of(directory, batch) for batch in fields_in(directory) if batch.startswith("validation/"))


def adapted_for(message: Message, context: Context) -> Adapted:
    """Returns the model with the peer's own tensors and those of the message in it."""
    config = message.content["config"]
    torch.set_num_threads(config["threads"])
    tuned = job_in(config["directory"])["mode"] == "tuned"
    adapted = (cached_load if tuned else load)(config["directory"])
    own = context.state["own"].to_torch_state_dict() if "own" in context.state else {}
    with torch.no_grad():
        for name, value in (own | message.content["arrays"].to_torch_state_dict()).items():
            adapted.tensors[name].copy_(value)
    return adapted


app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Does a round's local steps; replies with the shared tensors and the loss of each step."""
    began, config = time.time(), message.content["config"]
    directory, t = config["directory"], config["round"]
    job, names, adapted = job_in(directory), names_in(directory), adapted_for(message, context)
    optimizer = torch.optim.Adam([adapted.tensors[name] for name in names.trained], fused=job["mode"] == "tuned")
    optimizer.zero_grad()  # of the peer that was here before
    if "adam" in context.state:
        moments = context.state["adam"].to_torch_state_dict()
        for name in names.trained:
            optimizer.state[adapted.tensors[name]] = {key: moments[f"{name}/{key}"] for key in MOMENTS}
    losses = []
    for step, rate in enumerate(job["learning_rates"][t - 1]):
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = batch_of(directory, f"peer{config['peer']}/round{t}/step{step}")
        loss = cross_entropy(adapted.logits(batch), batch["labels"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    context.state["adam"] = record(
        {f"{name}/{key}": optimizer.state[adapted.tensors[name]][key] for name in names.trained for key in MOMENTS}
    )
    context.state["own"] = record({name: adapted.tensors[name] for name in names.all if name not in names.shared})
    shared = record({name: adapted.tensors[name] for name in names.shared})
    metrics = MetricRecord({"losses": losses, "began": began, "seconds": time.time() - began})
    return Message(RecordDict({"arrays": shared, "metrics": metrics}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Replies with the accuracy on the validation batches."""
    began = time.time()
    adapted, right, rows = adapted_for(message, context), 0, 0
    with torch.inference_mode():
        for batch in validation(message.content["config"]["directory"]):
            right += int((adapted.logits(batch).argmax(-1) == batch["labels"]).sum())
            rows += len(batch["labels"])
    metrics = MetricRecord({"accuracy": right / rows, "seconds": time.time() - began})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


@app.query()
def own(message: Message, context: Context) -> Message:
    """Replies with what the peer does not share: the run's result is shared tensors and these."""
    return Message(RecordDict({"arrays": context.state["own"]}), reply_to=message)


def record(tensors: dict[str, Tensor]) -> ArrayRecord:
    return ArrayRecord.from_torch_state_dict(tensors)
