"""Generation: who shares a pass changes nothing, and a real model goes on as it is known to."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from decoders import TARGETS as FAMILIES
from decoders import write_decoder
from dfl_lora.data.prompts import question_tokens, text_tokens, turn_ends, turns_tokens
from dfl_lora.errors import UserError
from dfl_lora.models.base import Files, load_tokenizer, locate
from dfl_lora.models.generation import DRAWN, Draws, Said, Sampling, generate, load_causal
from dfl_lora.models.plain import worn_in_turn
from dfl_lora.streams import torch_stream
from real import real
from speaking import POSITIONS, TEMPLATE, write_adapter, write_llama

SHORT = Sampling(max_new_tokens=24)
TEXTS = ("a", "Once upon a time there was", "18", "A question of some length: what is 3 times 6?", "", "zz", "why?")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return locate(str(write_llama(tmp_path_factory.mktemp("llama") / "tiny-llama")))


@pytest.fixture(scope="module")
def adapter(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapter") / "peer-000", files.path, seed=1)


def said(model: Any, files: Files, how: Sampling = SHORT, batch_size: int = 16) -> list[str]:
    """Returns what is said after each of the texts."""
    tokenizer = load_tokenizer(files)
    prompts = [text_tokens(tokenizer, text) for text in TEXTS]
    return [one.text for one in generate(model, tokenizer, prompts, how, batch_size)]


@pytest.mark.parametrize("how", [SHORT, replace(DRAWN, max_new_tokens=24), Sampling(1.0, max_new_tokens=24)])
def test_what_is_said_does_not_depend_on_who_shares_the_pass(files: Files, adapter: Path, how: Sampling) -> None:
    model = load_causal(files, adapter)
    alone = said(model, files, how, batch_size=1)
    assert len(set(alone)) > 1
    assert said(model, files, how) == alone == said(model, files, how, batch_size=3)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_on_the_left_changes_nothing_in_any_family(family: str, tmp_path: Path) -> None:
    files = locate(str(write_decoder(family, tmp_path, seed=3)))
    model, tokenizer = load_causal(files), load_tokenizer(files)
    prompts = [[5, 6, 7], [9] * 30, list(range(1, 14)), [70], [80, 81] * 9]
    alone, together = (generate(model, tokenizer, prompts, SHORT, size) for size in (1, 5))
    assert alone == together and len({one.text for one in alone}) == len(prompts)


def test_greedy_is_what_plain_steps_of_the_model_say(files: Files) -> None:
    model, tokenizer = load_causal(files), load_tokenizer(files)
    tokens = text_tokens(tokenizer, TEXTS[1])
    (one,) = generate(model, tokenizer, [tokens], SHORT)
    with torch.no_grad():
        for _ in range(one.num_tokens):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    assert one.num_tokens > 3
    assert tokenizer.decode(tokens[-one.num_tokens :]) == one.text


def test_draws_have_the_probabilities_of_the_scores() -> None:
    probabilities = torch.tensor([0.6, 0.3, 0.1, 0.0])
    stream = torch_stream(0, "test")
    drawn = Draws([stream] * 4000)(torch.empty(0), probabilities.log().expand(4000, -1)).argmax(1)
    assert torch.allclose(torch.bincount(drawn, minlength=4) / 4000, probabilities, atol=0.03)


def test_another_seed_draws_otherwise_and_the_same_seed_the_same(files: Files) -> None:
    model, hot = load_causal(files), Sampling(temperature=1.0, max_new_tokens=24)
    once = said(model, files, hot)
    assert said(model, files, hot) == once != said(model, files, replace(hot, seed=1))


def test_an_answer_ends_at_the_end_of_text_token_without_it(files: Files) -> None:
    model, tokenizer = load_causal(files), load_tokenizer(files)
    model.lm_head.weight.data[tokenizer.eos_token_id] = 0
    (whole,) = generate(model, tokenizer, [text_tokens(tokenizer, "a")], SHORT)
    assert not whole.ended and whole.num_tokens == 24
    digit = next(letter for letter in whole.text if letter in "0123456789")
    stop = tokenizer.convert_tokens_to_ids(digit)
    model.generation_config.eos_token_id = [stop, tokenizer.eos_token_id]
    (ended,) = generate(model, tokenizer, [text_tokens(tokenizer, "a")], SHORT)
    assert ended.ended and ended.text == whole.text.partition(digit)[0]


def test_a_prompt_too_long_loses_its_beginning_and_says_so(files: Files) -> None:
    model, tokenizer = load_causal(files), load_tokenizer(files)
    room = POSITIONS - SHORT.max_new_tokens
    fits, long = ([5] * count for count in (room, room + 40))
    first, second = generate(model, tokenizer, [fits, long], SHORT)
    assert (first.cut, second.cut) == (False, True) and first.text == second.text
    with pytest.raises(UserError, match=f"--max-new-tokens {POSITIONS} leaves no room .* reads {POSITIONS} tokens"):
        generate(model, tokenizer, [fits], Sampling(max_new_tokens=POSITIONS))
    with pytest.raises(UserError, match="A prompt is empty"):
        generate(model, tokenizer, [[]], SHORT)


def test_each_answer_is_heard_as_it_comes_the_longest_prompt_first(files: Files) -> None:
    tokenizer, told = load_tokenizer(files), dict[int, Said]()
    said = generate(load_causal(files), tokenizer, [[5], [6, 7], [8]], SHORT, 2, told.__setitem__)
    assert list(told) == [1, 0, 2] and said == [told[i] for i in range(3)]


def test_adapters_in_turn_say_what_each_says_alone(files: Files, adapter: Path, tmp_path: Path) -> None:
    adapters = {"base": None, "one": adapter, "fresh": write_adapter(tmp_path / "fresh", files.path, seed=None)}
    in_turn = {whose: said(model, files) for whose, model in worn_in_turn(load_causal(files), files, adapters)}
    assert in_turn == {whose: said(load_causal(files, path), files) for whose, path in adapters.items()}
    assert in_turn["fresh"] == in_turn["base"] != in_turn["one"]


def test_prompts_are_spelt_as_in_training(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(locate(str(write_llama(tmp_path / "chatty", template=TEMPLATE))))
    assert tokenizer.decode(question_tokens(tokenizer, "Why?")) == (
        "<s>Why?\nAnswer the above question. First think step by step and then answer the final number.\n"
    )
    said = (("user", "Hi"), ("assistant", "18"), ("user", "?"))
    turns = [{"role": role, "content": content} for role, content in said]
    assert tokenizer.decode(turns_tokens(tokenizer, turns)) == "user: Hi\nassistant: 18\nuser: ?\nassistant: "


@pytest.mark.parametrize(
    ("template", "end"), [
        (None, None), ("{{ messages[0].content + 1 }}", None), (TEMPLATE, None),
        (TEMPLATE.replace("{{ m.content }}", "{{ m.content }}</s>"), "</s>"),
    ],
)  # fmt: skip
def test_an_answer_ends_where_the_chat_template_ends_it_with_a_special_token(
    template: str | None, end: str | None, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(locate(str(write_llama(tmp_path / "chatty", template=template))))
    assert tokenizer.convert_ids_to_tokens(turn_ends(tokenizer)) == ([] if end is None else [end])


def test_whatever_a_chat_template_raises_is_told_in_a_sentence(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(locate(str(write_llama(tmp_path / "chatty", template="{{ messages[0].content + 1 }}"))))
    with pytest.raises(UserError, match="The chat template of the base model refuses the conversation: can only"):
        turns_tokens(tokenizer, [{"role": "user", "content": "Hi"}])


def stories(model: Path, adapter: Path | None, prompts: Sequence[str]) -> list[str]:
    files = locate(str(model))
    tokenizer = load_tokenizer(files)
    tokens = [text_tokens(tokenizer, prompt) for prompt in prompts]
    return [one.text for one in generate(load_causal(files, adapter), tokenizer, tokens, Sampling())]


@pytest.mark.parametrize("fresh", [False, True])
def test_a_real_model_goes_on_as_it_is_known_to(fresh: bool, tmp_path: Path) -> None:
    (model,) = real("models/stories260K-llama")
    adapter = write_adapter(tmp_path / "fresh", model, seed=None) if fresh else None
    golden = (model / "GOLDEN_greedy_256.txt").read_text()
    first, other = stories(model, adapter, ["", "One day, a dog"])
    assert first == golden and len(other) > 100
