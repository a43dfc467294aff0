"""What a recipe is to cite: a table from the values of its axes to entries of references.bib.

A row is the keys of entries, or a text that says why there is none. A value with an option that makes it another
method has a row of its own, such as alternating(mix=trained). Rows of which nothing is known here, a method of your
own, cite nothing. No torch here.
"""

import re
from collections.abc import Iterator, Mapping
from functools import reduce
from importlib.resources import files
from typing import Any

from dfl_lora.choices import Choice
from dfl_lora.recipe import GSM8K, Recipe

Row = tuple[str, ...] | str
ALWAYS = ("hu2022lora",)
TEXTBOOK, SEED, OWN = "a textbook graph", "a graph of the seed script", "given by the user"
ARITHMETIC = "arithmetic, no method"
GLUE = "wang2019glue"
CITED: Mapping[str, Mapping[str, Row]] = {
    "lora.use_rslora": {"True": ("kalajdzievski2023rslora",), "False": "the scale of LoRA itself"},
    "lora.init": {
        "kaiming": "the start of LoRA in PEFT",
        "orthonormal": ARITHMETIC,
        "gradient_svd": ("wang2024loraga", "halko2011finding"),
    },
    "peers.topology": {
        **dict.fromkeys(("ring", "line", "star", "complete", "torus", "hypercube", "clusters"), TEXTBOOK),
        **dict.fromkeys(("du14", "link3", "link4", "link5", "link6", "link7"), SEED),
        "exponential": ("ying2021exponential",),
        "random_regular": TEXTBOOK,
        "erdos_renyi": ("erdos1959random",),
        "small_world": ("watts1998collective",),
        "barabasi": ("barabasi1999emergence",),
        "base": ("takezawa2023base",),
        "one_peer_exponential": ("ying2021exponential",),
        "random_matching": ("boyd2006gossip",),
        "random_edges": ARITHMETIC,
        "epidemic": ("devos2023epidemic",),
        "none": "nobody talks",
        "edges": OWN,
        "matrix": OWN,
    },
    "peers.mixing": {
        "metropolis": ("xiao2005scheme",),
        "laplacian": ("xiao2004fast",),
        "max_degree": ("xiao2004fast",),
        "uniform": ARITHMETIC,
        "lazy": ("xiao2005scheme",),
    },
    "method.schedule": {
        "lora": "LoRA itself; its gossip is cited with the mixer",
        "freeze_a": ("sun2024ffalora",),
        "alternating": ("wang2025adflora", "wang2026tadlora"),
        "alternating(mix=trained)": ("chen2025rolora",),
        "share_a": ("guo2025fedsalora",),
        "core": ("ponkshe2024lorasb", "singhal2025fedsb"),
    },
    "method.correction": {
        "none": "nothing is corrected",
        "led": ("alghunaim2023led",),
        "k_gt": ("liu2024kgt",),
        "quasi_global": ("lin2021quasi",),
        "d2": ("tang2018d2",),
    },
    "method.mixer": {
        "plain": ("lian2017dpsgd", "ghiasvand2025declora"),
        "exact": ("mcmahan2017fedavg",),
        "chebyshev": ("lian2017dpsgd", "ghiasvand2025declora", "scaman2017optimal"),
        "finite_time": ("lian2017dpsgd", "ghiasvand2025declora", "sundaram2007finite"),
        "closing": ("lian2017dpsgd", "ghiasvand2025declora", "scaman2017optimal"),
        "gossip_pga": ("lian2017dpsgd", "ghiasvand2025declora", "chen2021pga", "scaman2017optimal"),
        "relay_sum": ("vogels2021relaysum",),
    },
    "method.combine": {
        "mean": "gossip itself, cited with the mixer",
        "product": ("saadati2025decaf",),
        "fair": ("bian2024lorafair",),
        "rotated": ("zhang2026fedrot",),
    },
    "method.codec": {
        "fp32": "nothing is encoded",
        "bf16": ARITHMETIC,
        "int8": ARITHMETIC,
        "top_k": ("tang2019deepsqueeze",),
        "choco": ("koloskova2019choco",),
    },
    "train.optimizer": {
        "adam": ("kingma2015adam",),
        "adamw": ("loshchilov2019adamw",),
        "sgd": "gradient descent, of textbooks",
    },
    "data.partition": {
        **dict.fromkeys(("iid", "linear", "square", "exponential"), ARITHMETIC),
        "dirichlet": ("hsu2019measuring",),
        "shards": ("mcmahan2017fedavg",),
        "pathological": ("li2022silos",),
        "quantity": ("li2022silos",),
        "length": ("hsu2019measuring",),
        "topic": ("hsu2019measuring",),
        "natural": OWN,
        "saved": OWN,
    },
    "task.name": {
        "sst2": (GLUE, "socher2013sst"),
        "mnli": (GLUE, "williams2018mnli"),
        "qnli": (GLUE, "rajpurkar2016squad"),
        "cola": (GLUE, "warstadt2019cola"),
        "mrpc": (GLUE, "dolan2005mrpc"),
        "qqp": (GLUE,),
        "rte": (GLUE, "dagan2005rte", "barhaim2006rte", "giampiccolo2007rte", "bentivogli2009rte"),
        "wnli": (GLUE, "levesque2012winograd"),
        GSM8K: ("cobbe2021gsm8k",),
    },
}
NAMED: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "model.name_or_path": {
        "minilm": ("wang2020minilm",),
        "all-minilm": ("reimers2019sbert",),
        "distilbert": ("sanh2019distilbert",),
        "llama-3": ("llama2024herd",),
        "stories260k": ("eldan2023tinystories",),
    },
    "data.path": {"tinystories": ("eldan2023tinystories",)},
}
"""Models and data sets by what is in their name, in small letters."""


def cited(recipe: Recipe) -> dict[str, list[str]]:
    """Returns the keys of what a recipe uses, each with the values that use it, in the order of the tables."""
    found = {key: ["every recipe"] for key in ALWAYS}
    idle = without_effect(recipe)
    for axis, rows in CITED.items():
        value = value_of(recipe, axis)
        row = row_of(value, rows)
        for key in () if axis in idle or isinstance(row, str) else row:
            found.setdefault(key, []).append(f"{axis} {value}")
    for axis, names in NAMED.items():
        name = str(value_of(recipe, axis))
        for key in (key for part, keys in names.items() if part in name.lower() for key in keys):
            found.setdefault(key, []).append(f"{axis} {name.rsplit('/', 1)[-1]}")
    return found


def without_effect(recipe: Recipe) -> set[str]:
    """Returns the axes whose value is not used: exact means and sums have weights of their own, as matrices have."""
    peers, exact = recipe.peers, recipe.method.mixer.kind == "exact"
    idle = set[str]()
    if exact or recipe.method.mixer.kind == "relay_sum" or peers.topology.kind == "matrix":
        idle |= {"peers.mixing"}
    if exact:
        idle |= {"peers.topology"}
    if peers.num_peers == 1 or (peers.topology.kind == "none" and not exact):
        idle |= {"peers.topology", "peers.mixing", "method.mixer", "method.combine", "method.codec"}
    if peers.num_peers == 1 or recipe.data.per_peer is not None:
        idle |= {"data.partition"}
    return idle


def value_of(recipe: Recipe, axis: str) -> Any:
    """Returns what stands at a dotted key."""
    return reduce(getattr, axis.split("."), recipe)


def row_of(value: object, rows: Mapping[str, Row]) -> Row:
    """Returns the row of a value: that with an option of it, or that of its name, or none."""
    if not isinstance(value, Choice):
        return rows.get(str(value), ())
    variants = (f"{value.kind}({option}={given})" for option, given in value.options.items())
    return next((rows[v] for v in variants if v in rows), rows.get(value.kind, ()))


def references() -> dict[str, str]:
    """Returns the entries of references.bib by key."""
    content = (files("dfl_lora") / "references.bib").read_text(encoding="utf-8")
    return {match[1]: match[0] for match in re.finditer(r"^@\w+\{([^,]+),$.*?^\}$", content, re.MULTILINE | re.DOTALL)}


def bibtex(recipe: Recipe) -> Iterator[str]:
    """Yields the entries of what a recipe uses, each below a line that says what uses it."""
    entries = references()
    for key, users in cited(recipe).items():
        yield f"% {'; '.join(users)}\n{entries[key]}\n"
