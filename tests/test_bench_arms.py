"""Every arm of the benchmark does the work of the reference, and an arm that does less is found out."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from benched import tiny_cell, tiny_material
from dfl_lora.bench.arms import Adapter, Arm, Kind
from dfl_lora.bench.arms.mixed import Mixed
from dfl_lora.bench.arms.one_by_one import seed_plus
from dfl_lora.bench.arms.own import ours, reference
from dfl_lora.bench.cells import Material, MethodName
from dfl_lora.bench.gate import same_course, same_end
from dfl_lora.bench.reading import Reader
from dfl_lora.bench.setting import Setting, federation_of, setting_of
from dfl_lora.bench.table import KINDS
from dfl_lora.bench.timing import Counted, counting
from dfl_lora.bench.trial import course
from dfl_lora.recipe import Recipe

METHODS: tuple[MethodName, ...] = ("LoRA", "DFL-LoRA")
ONE_THREAD = {"dtype": "float32", "threads": 1}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return tiny_material(tmp_path_factory.mktemp("bench"))


def recipe_of(material: Material, method: MethodName, steps: int = 2) -> Recipe:
    return tiny_cell(method, steps).recipe(material, 2, compute=ONE_THREAD)


def end_of(arm: Arm, rounds: int = 2) -> Sequence[Adapter]:
    for _ in range(rounds):
        arm.train_round()
        arm.mix()
    return arm.adapters()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_every_arm_passes_the_gate(kind: Kind, method: MethodName, tiny: Material) -> None:
    if kind.only not in (None, method):
        pytest.skip(f"{kind.only} alone has it")
    recipe = recipe_of(tiny, method)
    setting = setting_of(federation_of(recipe))
    try:
        arm = kind.make(recipe, setting, "float32")
    except NotImplementedError as reason:
        pytest.skip(str(reason))
    verdict = same_end(end_of(arm), end_of(reference(recipe)), setting.placement)
    assert verdict.passed, verdict
    assert set(verdict.measured) == {"A", "B", "head"}
    assert arm.evaluate() == pytest.approx(reference_accuracies(recipe))


def reference_accuracies(recipe: Recipe) -> Sequence[float]:
    arm = reference(recipe)
    end_of(arm)
    return arm.evaluate()


@pytest.mark.parametrize("method", METHODS)
def test_an_arm_that_does_less_work_fails_the_gate(method: MethodName, tiny: Material) -> None:
    recipe = recipe_of(tiny, method)
    setting = setting_of(federation_of(recipe))
    whole = end_of(reference(recipe))
    alone = [[float(i == j) for j in range(3)] for i in range(3)]
    lazy: dict[str, Setting] = {
        "a step less": replace(setting, work=replace(setting.work, steps=1)),
        "a row less in a batch": replace(setting, work=replace(setting.work, batch_size=3)),
        "no mixing": replace(setting, weights=alone),
        "another learning rate": replace(setting, work=replace(setting.work, learning_rate=1.01e-3)),
    }
    for name, less in lazy.items():
        verdict = same_end(end_of(seed_plus(recipe, less, "float32")), whole, setting.placement)
        assert not verdict.passed, name


@pytest.mark.parametrize("method", METHODS)
def test_in_bfloat16_an_arm_is_judged_by_its_way(method: MethodName, tiny: Material) -> None:
    parts = {"compute": ONE_THREAD, "evaluate": {"rows": 40, "metric": "accuracy"}}
    recipe = tiny_cell(method, steps=1, rows=16).recipe(tiny, 4, **parts)
    setting = setting_of(federation_of(recipe))
    right = course(reference(recipe))
    for arm in (Mixed(recipe, setting, "bfloat16"), ours(recipe, setting, "bfloat16")):
        verdict = same_course(course(arm), right, setting.placement)
        far = {name: d for name, d in verdict.measured.items() if d > verdict.allowed[name]}
        assert far.keys() <= {"accuracy"}, far  # 120 answers of a random base: one more or less is no point
    other = replace(setting, work=replace(setting.work, seed=1))
    verdict = same_course(course(Mixed(recipe, other, "bfloat16")), right, setting.placement)
    assert not verdict.passed


def test_the_seed_pads_to_the_longest_of_a_block_and_a_fair_loop_to_the_longest_of_the_batch(tiny: Material) -> None:
    setting = setting_of(federation_of(recipe_of(tiny, "LoRA")))
    shard = setting.data.train[0]
    rows = Reader(setting).rows(0, 0)
    lengths = shard.source.lengths
    assert Reader(setting).batch(0, 0).labels.shape == (4,)
    assert Reader(setting).batch(0, 0).inputs["input_ids"].shape[1] == lengths[rows].max()
    assert Reader(setting, 1000).batch(0, 0).inputs["input_ids"].shape[1] == lengths[shard.rows].max()
    assert Reader(setting, 1).batch(0, 0).inputs["input_ids"].shape[1] == lengths[rows].max()


@pytest.mark.parametrize("kind", ["seed+", "ours"])
def test_what_an_arm_executes_is_counted(kind: str, tiny: Material) -> None:
    recipe = recipe_of(tiny, "LoRA")
    setting = setting_of(federation_of(recipe))
    arm, counted = KINDS[kind].make(recipe, setting, "float32"), Counted()
    with counting(arm, counted):
        arm.train_round()
    shards = setting.data.train
    rows = [(shards[i], setting.work.order.rows(shards[i], i, c)) for i in range(3) for c in range(2)]
    lengths = [shard.source.lengths[chosen] for shard, chosen in rows]
    useful = sum(setting.shape.train_flops(own, frozen_a=False) for own in lengths)
    assert sum(own.sum() for own in lengths) <= counted.tokens
    least = 0.4 if kind == "ours" else 0.7  # the last of two layers is computed for first tokens alone
    assert least < counted.flops / useful < 2
