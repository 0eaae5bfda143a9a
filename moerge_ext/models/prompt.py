"""One prompt as model inputs."""

from __future__ import annotations

from typing import Any


def encode(tokenizer: Any, prompt: str, *, chat: bool) -> Any:
    """Model inputs for one prompt. ValueError when it has no token."""
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("--chat: this tokenizer has no chat template; leave --chat out")
        messages = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
        inputs.pop("token_type_ids", None)
    if inputs["input_ids"].shape[1] == 0:
        raise ValueError(f"the prompt {prompt!r} has no token: give the model some text to continue")
    return inputs
