"""The whole benchmark: headline, memory, scale, grid, in this order and within a number of minutes."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

from dfl_lora.bench.arms.flower import Mode
from dfl_lora.bench.cells import Cell, Material, MethodName
from dfl_lora.bench.child import arm_job, ask
from dfl_lora.bench.facts import facts
from dfl_lora.bench.flower_trial import run_flower
from dfl_lora.bench.planner import Plan
from dfl_lora.bench.scale import scale
from dfl_lora.bench.table import ABLATIONS, BASELINES, GRID, MIXED, OURS, SEED, SEED_PLUS, SWITCH, multiplies_bf16
from dfl_lora.bench.targets import targets
from dfl_lora.bench.trial import NO_TIME, Entry, Stage, run_cell

METHODS: tuple[MethodName, ...] = ("LoRA", "DFL-LoRA")
PEERS, TOKENS, MOST_TOKENS = (1, 7, 16, 64), (64, 256, 1024, 4096), 16_384
"""The grid; cells with more than 16,384 tokens a step are left out."""
STEPS_OF = {64: 4, 256: 2}
"""Local steps of a round of the grid: small steps are timed several at a time."""
GRID_EVALUATED = 2
Say = Callable[[str], None]
Result = dict[str, Any]


@dataclass(frozen=True)
class Scope:
    """How much is measured, and what each part may take, in minutes."""

    name: str
    minutes: float
    batches: Mapping[int, int]
    """Rows of a local step: local steps of a round."""
    weights: Mapping[str, float]
    repeats: int
    ablations: bool
    flower: tuple[Mode, ...]
    memory: bool
    grid_peers: tuple[int, ...]
    most_tokens: int
    toy_peers: tuple[int, ...]
    minilm_peers: tuple[int, ...]


FULL = Scope(
    name="bench",
    minutes=43,
    batches={16: 4, 128: 1},
    weights={
        "16": 3.0,
        "128": 4.5,
        "flower 16": 2.0,
        "flower 128": 3.0,
        "memory": 4.5,
        "mixing": 0.3,
        "scale": 5.0,
        "grid": 9.0,
    },
    repeats=5,
    ablations=True,
    flower=("tuned", "template"),
    memory=True,
    grid_peers=PEERS,
    most_tokens=MOST_TOKENS,
    toy_peers=(8, 64, 512, 4096),
    minilm_peers=(8, 64, 512),
)
QUICK = Scope(
    name="bench-quick",
    minutes=4.5,
    batches={16: 2},
    weights={"16": 1.2, "flower 16": 0.6, "memory": 0.01, "mixing": 0.1, "scale": 0.5, "grid": 0.5},
    repeats=2,
    ablations=False,
    flower=("tuned",),
    memory=False,
    grid_peers=(1, 7),
    most_tokens=512,
    toy_peers=(8, 64, 512),
    minilm_peers=(8,),
)
ALONE = {True: 3.0, False: 20.0}
"""Minutes of the scale test alone, quick or not."""


def entries(kinds: Any) -> list[Entry]:
    """Returns arms in both precisions; where bfloat16 is not at hand each is told as not run, with the reason."""
    return [Entry(kind, dtype) for kind in kinds for dtype in ("float32", "bfloat16")]


def headline_entries(scope: Scope) -> list[Entry]:
    """The seed is what it is in float32; the ablations run in the precision that `auto` takes here."""
    default = "bfloat16" if multiplies_bf16() else "float32"
    ablations = [Entry(kind, default) for kind in ABLATIONS] if scope.ablations else []
    return [*entries([OURS, *BASELINES]), *ablations]


def grid_cells(scope: Scope, mean_length: float) -> Iterator[Cell]:
    """Yields the cells of the grid, the smallest first."""
    sizes = sorted((n * tokens, n, tokens) for n in scope.grid_peers for tokens in TOKENS)
    for total, n, tokens in sizes:
        if total <= scope.most_tokens:
            for method in METHODS:
                rows, steps = max(1, round(tokens / mean_length)), STEPS_OF.get(tokens, 1)
                yield Cell(method, n, rows, steps, {"kind": "iid"}, tokens, GRID_EVALUATED)


def plan_of(scope: Scope, minutes: float | None) -> Plan:
    """Returns the plan with a part for each piece of work, in order."""
    weights = dict[str, float]()
    for batch in scope.batches:
        for method in METHODS:
            weights[f"{method} {batch}"] = scope.weights[str(batch)]
            share = scope.weights[f"flower {batch}"] / len(scope.flower)
            weights |= {f"{method} {batch} flower {mode}": share for mode in scope.flower}
    weights |= {name: scope.weights[name] for name in ("memory", "mixing", "scale", "grid")}
    return Plan(60 * (minutes or scope.minutes), weights)


def bench(material: Material, scope: Scope, minutes: float | None, say: Say) -> Result:
    """Returns everything that was measured, and whether it is what is wanted."""
    begun, plan = perf_counter(), plan_of(scope, minutes)
    result = empty(material, scope)
    result["headline"] = [headline(m, batch, scope, material, plan, say) for batch in scope.batches for m in METHODS]
    if scope.memory:
        say("memory and start-up")
        result["memory"] = memory(material, plan.share_s("memory"), say)
    say("scale")
    result["mixing"] = ask({"what": "mixing"}, plan.share_s("mixing"))
    result["scale"] = scale(material, scope.toy_peers, scope.minilm_peers, plan.share_s("scale"), say)
    result["grid"] = grid(scope, material, plan, result["headline"], say)
    result |= {"seconds": perf_counter() - begun, "planned_seconds": plan.total_s}
    return result | {"targets": targets(result)}


def bench_scale(material: Material, scope: Scope, minutes: float | None, say: Say) -> Result:
    """Returns the scale test alone."""
    begun, result = perf_counter(), empty(material, scope)
    planned = 60 * (minutes or ALONE[scope is QUICK])
    result["mixing"] = ask({"what": "mixing"}, planned)
    result["scale"] = scale(material, scope.toy_peers, scope.minilm_peers, planned, say)
    result |= {"seconds": perf_counter() - begun, "planned_seconds": planned}
    return result | {"targets": targets(result)}


def empty(material: Material, scope: Scope) -> Result:
    """Returns a result before anything is measured."""
    known = {"scope": scope.name, **facts(), "rows": material.rows, "model": material.model, "repeats": scope.repeats}
    return {**known, "headline": [], "memory": {}, "mixing": {}, "scale": {}, "grid": []}


def headline(method: MethodName, batch: int, scope: Scope, material: Material, plan: Plan, say: Say) -> Result:
    """Runs one cell of the headline with all arms, Flower's in both forms."""
    cell, part = Cell(method, 7, batch, scope.batches[batch]), f"{method} {batch}"
    say(cell.name)
    stage = Stage.of(cell, material, scope.repeats + 1)
    result = run_cell(stage, headline_entries(scope), plan.share_s(part), scope.repeats, say)
    for mode in scope.flower:
        for dtype, short in (("float32", "fp32"), ("bfloat16", "bf16")):
            name = f"flower {mode}, {short}"
            say(f"  {name}")
            result["arms"][name] = run_flower(stage, mode, dtype, plan.share_s(f"{part} flower {mode}"))
    return result


def memory(material: Material, budget_s: float, say: Say) -> Result:
    """Returns start-up and memory of arms, each in a process of its own."""
    begun = perf_counter()
    small, large = (Cell("DFL-LoRA", n, b, 1, {"kind": "iid"}, evaluate=16) for n, b in ((7, 16), (16, 128)))
    jobs = [(SEED, large), (OURS, large), (SEED, Cell("DFL-LoRA", 1, 16, 1, {"kind": "iid"}, evaluate=16)),
            (SEED, Cell("DFL-LoRA", 8, 16, 1, {"kind": "iid"}, evaluate=16)),
            *((kind, small) for kind in (SEED, SEED_PLUS, SWITCH, MIXED, OURS))]  # fmt: skip
    result: Result = {}
    for kind, cell in jobs:
        name = f"{kind.name}, {cell.num_peers} peers x {cell.batch_size} rows"
        say(f"  {name}")
        dtype = "bfloat16" if kind is OURS and multiplies_bf16() else "float32"
        left = budget_s - (perf_counter() - begun)
        told = ask(arm_job(kind.name, dtype, cell, material), left) if left > 1 else no_time()
        result[name] = {"arm": kind.name, **asdict(cell), **told}
    return result


def grid(scope: Scope, material: Material, plan: Plan, headlines: list[Result], say: Say) -> list[Result]:
    """Runs the grid, the smallest cells first; cells that no longer fit into the plan are told as not run."""
    first = headlines[0]
    mean_length = first["real_tokens"] / (first["num_peers"] * first["batch_size"] * first["steps"])
    slowest = max(arm["train_s"]["median"] for arm in first["arms"].values() if arm["ran"])
    token_s = slowest / first["real_tokens"] / 2  # the seed's, which is not in the grid, is the double of the others'
    cells, results = list(grid_cells(scope, mean_length)), list[Result]()
    shares = Plan(plan.left_s, {c.name: c.num_peers * (c.tokens or 0) * c.steps + 500.0 for c in cells})
    for cell in cells:
        say(cell.name)
        tokens = cell.num_peers * cell.batch_size * cell.steps * mean_length
        needed = 7 * tokens * token_s + 5
        if needed > shares.left_s:
            reason = f"it needs about {needed:.0f} s, and the plan has {max(shares.left_s, 0):.0f} s left"
            results.append({"cell": cell.name, "method": cell.method, "num_peers": cell.num_peers,
                            "tokens": cell.tokens, "ran": False, "reason": reason})  # fmt: skip
            continue
        wanted = grid_repeats(scope, cell)
        stage = Stage.of(cell, material, wanted + 1)
        results.append(run_cell(stage, entries([OURS, *GRID]), shares.share_s(cell.name), wanted, say))
    return results


def grid_repeats(scope: Scope, cell: Cell) -> int:
    """Five repeats at 7 and 16 peers, three elsewhere."""
    return min(scope.repeats, 5 if cell.num_peers in (7, 16) else 3)


def no_time() -> Result:
    return {"ran": False, "reason": NO_TIME}
