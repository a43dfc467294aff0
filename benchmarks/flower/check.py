"""Compares Flower's arm with a plain loop on a tiny random BERT: .venv/bin/python check.py.

The loop knows neither PEFT nor Flower: every product runs with the weight W0 + lora_alpha / r * B A, each peer has its
own Adam for the whole run, and mixing is written peer by peer.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from client import Job, batch_of, names_in
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertForSequenceClassification

TOLERANCE = 1e-5  # relative norm of a tensor, in float32
TENSORS = {"A": (4, 32), "B": (32, 4)}
HEAD = {"classifier.weight": (3, 32), "classifier.bias": (3,), "bert.pooler.dense.weight": (32, 32)}
TARGETS = ["query", "value"]
JOB: Job = {
    "model": "",
    "num_labels": 3,
    "r": 4,
    "lora_alpha": 8.0,
    "target_modules": TARGETS,
    "learning_rates": [[1e-3, 2e-3], [1e-3, 5e-4], [1e-3, 1e-3]],
    "rounds": 3,
    "steps": 2,
    "num_peers": 3,
    "W": [[0.5, 0.5, 0.0], [0.5, 0.25, 0.25], [0.0, 0.25, 0.75]],
    "train_a": True,
    "shared_head": True,
    "dtype": "float32",
    "attention": "sdpa",
    "threads": 2,
    "mode": "tuned",
}


def make(directory: Path, job: Job, per_peer: bool) -> None:
    """Writes a job; with per_peer every peer has a start of its own."""
    config = BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, num_labels=3
    )
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(directory / "model")
    (directory / "job.json").write_text(json.dumps({**job, "model": str(directory / "model")}))
    layers = [f"bert.encoder.layer.{i}.attention.self.{target}" for i in range(2) for target in TARGETS]
    shapes = {f"{layer}.{role}": shape for layer in layers for role, shape in TENSORS.items()} | HEAD
    prefixes = [f"peer{i}/" for i in range(job["num_peers"])] if per_peer else [""]
    save_file(
        {f"{prefix}{name}": torch.randn(shape) / 8 for prefix in prefixes for name, shape in shapes.items()},
        directory / "start.safetensors",
    )
    training = [
        f"peer{i}/round{t}/step{s}"
        for i in range(job["num_peers"])
        for t in range(1, job["rounds"] + 1)
        for s in range(job["steps"])
    ]
    data: dict[str, Tensor] = {}
    for batch in [*training, "validation/0", "validation/1"]:
        lengths = torch.randint(5, 13, (8, 1))
        mask = (torch.arange(12) < lengths).long()
        data[f"{batch}/input_ids"] = torch.randint(1, 100, (8, 12)) * mask
        data[f"{batch}/attention_mask"] = mask
        data[f"{batch}/token_type_ids"] = torch.zeros_like(mask)
        data[f"{batch}/labels"] = torch.randint(0, 3, (8,))
    save_file(data, directory / "data.safetensors")


def plain_loop(directory: Path, job: Job) -> dict[str, Tensor]:
    """Returns what end.safetensors has to hold."""
    names, start, scale = (
        names_in(str(directory)),
        load_file(directory / "start.safetensors"),
        job["lora_alpha"] / job["r"],
    )
    model = BertForSequenceClassification.from_pretrained(directory / "model").eval()
    base = {name: parameter.detach() for name, parameter in model.named_parameters()}
    every = range(job["num_peers"])
    peers = [{name: start.get(f"peer{i}/{name}", start.get(name)).clone() for name in names.all} for i in every]
    for x in peers:
        for name in names.trained:
            x[name].requires_grad_()
    optimizers = [torch.optim.Adam([x[name] for name in names.trained]) for x in peers]
    for t, rates in enumerate(job["learning_rates"], start=1):
        for i, (x, optimizer) in enumerate(zip(peers, optimizers, strict=True)):
            for step, rate in enumerate(rates):
                optimizer.param_groups[0]["lr"] = rate
                weights = base | {name: value for name, value in x.items() if not name.endswith((".A", ".B"))}
                for name in (name.removesuffix(".A") for name in names.all if name.endswith(".A")):
                    weights[f"{name}.weight"] = base[f"{name}.weight"] + scale * x[f"{name}.B"] @ x[f"{name}.A"]
                batch = batch_of(str(directory), f"peer{i}/round{t}/step{step}")
                optimizer.zero_grad()
                cross_entropy(functional_call(model, weights, (), batch).logits, batch["labels"]).backward()
                optimizer.step()
        with torch.no_grad():
            for name in names.shared:
                old = [x[name].clone() for x in peers]
                for i in every:
                    for j in every:
                        peers[i][name] += job["W"][i][j] * (old[j] - old[i])
    return {f"peer{i}/{name}": value.detach() for i, x in enumerate(peers) for name, value in x.items()}


def check(job: Job, per_peer: bool) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        make(directory, job, per_peer)
        subprocess.run([sys.executable, Path(__file__).with_name("run.py"), directory], check=True)
        expected, end = plain_loop(directory, job), load_file(directory / "end.safetensors")
        out = json.loads((directory / "out.json").read_text())
    assert end.keys() == expected.keys(), end.keys() ^ expected.keys()
    worst = max(float((end[name] - value).norm() / value.norm()) for name, value in expected.items())
    losses = [loss for round_ in out["rounds"] for peer in round_["losses"] for loss in peer]
    print(f"{job['mode']} {job['dtype']} train_a={job['train_a']} shared_head={job['shared_head']}: {worst:.1e}")
    return worst < TOLERANCE and len(losses) == job["num_peers"] * job["rounds"] * job["steps"]


if __name__ == "__main__":
    private: Job = {**JOB, "train_a": False, "shared_head": False, "attention": "eager", "mode": "template"}
    results = [check(JOB, per_peer=True), check(private, per_peer=False)]
    sys.exit(0 if all(results) else 1)
