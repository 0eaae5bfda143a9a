"""One answer to a prompt, whatever a model's generation config asks for beside its rules for logits."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# more answers than one, another form of them, other ends than tokens and limits, and ways of search
SET_ASIDE = (
    "return_dict_in_generate", "num_return_sequences", "num_beams", "num_beam_groups", "diversity_penalty",
    "penalty_alpha", "dola_layers", "constraints", "force_words_ids", "stop_strings", "max_time", "token_healing",
    "prompt_lookup_num_tokens", "assistant_early_exit",
)  # fmt: skip


@contextmanager
def one_answer(model: Any) -> Iterator[None]:
    """A block in which the model's generation config says none of `SET_ASIDE`."""
    own = model.generation_config
    plain, empty = copy.copy(own), type(own)()
    for name in SET_ASIDE:
        if hasattr(plain, name):
            setattr(plain, name, getattr(empty, name, None))
    model.generation_config = plain
    try:
        yield
    finally:
        model.generation_config = own
