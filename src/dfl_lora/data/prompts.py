"""Prompts as the rows of training spell them: what a causal language model is to go on from, in tokens."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from dfl_lora.data.causal import DATE, opening_tokens
from dfl_lora.data.formats import ASK, Turn
from dfl_lora.errors import UserError


def question_tokens(tokenizer: PreTrainedTokenizerBase, question: str) -> list[int]:
    """Returns the prompt of a question of GSM8K."""
    return text_tokens(tokenizer, question + ASK)


def text_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Returns what begins a text, such as <s>, and the tokens of the text."""
    tokens: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []
    return [*opening_tokens(tokenizer), *tokens]


def turns_tokens(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn]) -> list[int]:
    """Returns a conversation as the chat template writes it, up to where the assistant speaks.

    Without a chat template it is the text of the last turn alone.
    """
    if tokenizer.chat_template is None:
        return text_tokens(tokenizer, turns[-1]["content"])
    try:
        text = tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=True, date_string=DATE)
    except Exception as error:  # whatever a template raises
        raise UserError(f"The chat template of the base model refuses the conversation: {error}.") from None
    tokens: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return tokens
