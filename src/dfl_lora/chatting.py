"""Talking with what was trained: an adapter on its base answers a text, or the last turn of a conversation."""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from dfl_lora.data.formats import Turn
from dfl_lora.data.prompts import turn_ends, turns_tokens
from dfl_lora.errors import UserError
from dfl_lora.models.generation import Said, Sampling, generate, load_causal
from dfl_lora.trained import Trained


@dataclass(frozen=True)
class Speaker:
    """A causal language model with one adapter on it."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    sampling: Sampling

    @property
    def remembers(self) -> bool:
        """Whether what was said before is read again: only where a chat template tells who said what."""
        return self.tokenizer.chat_template is not None

    def reply(self, turns: list[Turn]) -> Said:
        """Returns the answer to the last of these turns."""
        prompt, ends = turns_tokens(self.tokenizer, turns), turn_ends(self.tokenizer)
        (said,) = generate(self.model, self.tokenizer, [prompt], self.sampling, ends=ends)
        return said


def speaker(trained: Trained, sampling: Sampling) -> Speaker:
    """Loads the one adapter that was chosen, on its base; raises where it does not go on texts."""
    if not trained.causal:
        raise UserError(
            f"{trained.place} tells labels and writes no texts, so there is nobody to talk to; "
            "use dfl-lora eval, or a run of task.kind causal_lm."
        )
    if len(trained.adapters) != 1:
        raise UserError(f"{trained.place} has {', '.join(trained.adapters)}; choose one by --peer K or --consensus.")
    (adapter,) = trained.adapters.values()
    files = trained.files()
    return Speaker(load_causal(files, adapter), trained.tokenizer(files), sampling)
