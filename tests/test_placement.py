"""How adapters start."""

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from dfl_lora.errors import UserError
from dfl_lora.models.placement import INITS, Lora, match, place
from dfl_lora.models.toy import ToyModel
from dfl_lora.streams import torch_stream


@pytest.mark.parametrize(("r", "d_in"), [(1, 1), (4, 384), (16, 16), (8, 12)])
def test_orthonormal_rows_are_orthonormal(r: int, d_in: int) -> None:
    a = INITS["orthonormal"](r, d_in, torch_stream(0, "A")).double()
    assert torch.allclose(a @ a.T, torch.eye(r, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("r", [1, 4, 64])
def test_kaiming_is_uniform_within_one_over_the_root_of_d_in(r: int) -> None:
    a = INITS["kaiming"](r, 400, torch_stream(0, "A"))
    assert a.abs().max() <= 1 / 20
    assert a.std() == pytest.approx(1 / 20 / 3**0.5, rel=0.1)


@pytest.mark.parametrize("init", INITS)
def test_the_seed_names_the_start_and_b_is_zero(init: str) -> None:
    model = ToyModel(8, 3, 0)
    placement = place(model, "encoder", Lora(["first", "second"], r=4, init=init))
    start, again, other = (placement.start(model, seed, torch.float32) for seed in (0, 0, 1))
    assert torch.equal(start.flat, again.flat)
    assert not torch.isclose(start["encoder.first.A"], other["encoder.first.A"]).any()
    assert not start["encoder.first.B"].any()
    assert not torch.isclose(start["encoder.first.A"][:, :4], start["encoder.second.A"][:, :4]).any()


def test_the_signs_of_orthonormal_rows_are_drawn_too() -> None:
    """Of a uniformly distributed A every number is as often negative as positive."""
    draws = torch.stack([INITS["orthonormal"](2, 3, torch_stream(seed, "A")) for seed in range(200)])
    assert ((draws > 0).float().mean(0) - 0.5).abs().max() < 0.15


def test_a_rank_above_the_inputs_has_no_orthonormal_rows() -> None:
    with pytest.raises(UserError, match=r"at most the 8 inputs .* lora.r is 9; use a smaller rank or init kaiming"):
        INITS["orthonormal"](9, 8, torch_stream(0, "A"))


@pytest.fixture(scope="module")
def mixture() -> MixtralForCausalLM:
    """A model whose experts are one module of fused weights, on which PEFT puts layers within layers."""
    shape = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2}
    return MixtralForCausalLM(MixtralConfig(**shape, **heads))


def test_what_is_matched_is_a_module_of_the_model(mixture: MixtralForCausalLM) -> None:
    matched = match(mixture, Lora("all-linear"))
    assert "model.layers.0.mlp.experts" in matched and matched <= {name for name, _ in mixture.named_modules()}


def test_of_several_modules_that_carry_no_lora_the_first_by_name_is_told(mixture: MixtralForCausalLM) -> None:
    with pytest.raises(UserError, match=r"'model\.layers\.0\.mlp\.experts'.*MixtralExperts"):
        place(mixture, "model", Lora("all-linear"), head=False)
