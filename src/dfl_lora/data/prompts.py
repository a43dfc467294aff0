"""Prompts as the rows of training spell them: what a causal language model is to go on from, in tokens."""

from collections.abc import Sequence
from functools import partial

from transformers import PreTrainedTokenizerBase

from dfl_lora.data.causal import opening_tokens, templated
from dfl_lora.data.formats import ASK, BadRow, Refusal, Turn, spoken
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

    As in training, what was answered so far is made into tokens apart. Without a chat template it is the text of the
    last turn alone.
    """
    if tokenizer.chat_template is None:
        return text_tokens(tokenizer, turns[-1]["content"])
    chat = partial(templated, tokenizer)
    try:
        whole = chat(turns, True)
    except Refusal as refusal:
        raise UserError(f"The chat template of the base model refuses the conversation: {refusal.why}.") from None
    try:
        before = [segment.text for segment in spoken(turns, chat) if segment.text]
    except BadRow:  # nothing was answered, or the template does not write turn after turn
        before = []
    known = "".join(before)
    parts = [*before, whole[len(known) :]] if whole.startswith(known) else [whole]
    pieces = tokenizer([part for part in parts if part], add_special_tokens=False, verbose=False)["input_ids"]
    return [token for piece in pieces for token in piece]


def turn_ends(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the special token that the chat template writes after what the assistant says, where it is one."""
    if tokenizer.chat_template is None:
        return []
    said = "b"
    try:
        text = templated(tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": said}], False)
    except Refusal:  # it takes no such turns: said where they are asked for
        return []
    after = tokenizer(text.rpartition(said)[2], add_special_tokens=False, verbose=False)["input_ids"]
    return [token for token in after[:1] if token in tokenizer.added_tokens_decoder]
