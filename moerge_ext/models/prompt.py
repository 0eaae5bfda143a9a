"""How the text that a model is given is made of a row: one rule for training, evaluation and generation."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..files.examples import Example, as_example
from ..files.listing import at_rows
from ..files.rows import parse_json
from .pretrained import open_ids

INPUT = "{input}"
_FIELD = re.compile(r"\{\{(?P<literal>\w+)\}\}|\{(?P<field>\w+)\}")


@dataclass(frozen=True)
class Prompt:
    """A text that a model is given. special: the special tokens are in it already, as a chat template writes them."""

    text: str
    special: bool = False

    def ids(self, tokenizer: Any, ends: Sequence[int], *, seq2seq: bool) -> list[int]:
        """Token ids; for a decoder, which is to go on, without the end that some tokenizers add."""
        if self.special:
            return tokenizer(self.text, add_special_tokens=False).input_ids
        return tokenizer(self.text).input_ids if seq2seq else open_ids(tokenizer, self.text, ends)

    def some_ids(self, tokenizer: Any, ends: Sequence[int], *, seq2seq: bool) -> list[int]:
        """The same; ValueError when there is none."""
        ids = self.ids(tokenizer, ends, seq2seq=seq2seq)
        if not ids:
            raise ValueError(f"the prompt {self.text!r} has no token: give the model some text to continue")
        return ids


@dataclass(frozen=True)
class PromptFormat:
    """How a row becomes the text that a model is given.

    template: that text, with {field} for fields of the row; {{word}} is the text {word}. Of a row of messages it is
    what the user said last.
    chat: it is put, as the user's message, through the tokenizer's chat template, up to where the answer begins. Rows
    of messages are in any case.
    """

    template: str = INPUT
    chat: bool = False

    def __post_init__(self) -> None:
        if not self.fields:
            raise ValueError(f"the template must contain {INPUT}, or another field of the rows, got {self.template!r}")

    @property
    def fields(self) -> list[str]:
        """The fields that the template names."""
        return [found["field"] for found in _FIELD.finditer(self.template) if found["field"]]

    def text(self, row: Mapping[str, Any]) -> str:
        """The template filled with the row, before any chat template. ValueError for fields that are not texts."""
        problems = []
        for name in dict.fromkeys(self.fields):
            if name not in row:
                given = ", ".join(sorted(map(str, row)))
                hint = (
                    " (meta.json beside a file of rows can say it, or --instruction of generate)"
                    if name == "instruction"
                    else ""
                )
                problems.append(f"the template asks for {{{name}}}, and the row has only {given}{hint}")
            elif not isinstance(row[name], (str, int, float)):
                problems.append(f"the template asks for {{{name}}}, a {type(row[name]).__name__}, not a text")
        if problems:
            raise ValueError("; ".join(problems))
        # in one pass: what looks like a field in a row's own text is none
        return _FIELD.sub(lambda f: str(row[f["field"]]) if f["field"] else f"{{{f['literal']}}}", self.template)

    def prompt(self, row: Mapping[str, Any], tokenizer: Any) -> Prompt:
        """What the model is given for a row with "input". ValueError for a row or a tokenizer that does not fit."""
        messages = row.conversation if isinstance(row, Example) else None
        if messages is None:
            return self.around(self.text(row), tokenizer)
        last = max(i for i, message in enumerate(messages) if message["role"] == "user")
        messages = [*messages[:last], {**messages[last], "content": self.text(row)}, *messages[last + 1 :]]
        return _chat(tokenizer, messages, "rows of messages")

    def around(self, text: str, tokenizer: Any) -> Prompt:
        """A text as it is, or with `chat` as the user's message."""
        return _chat(tokenizer, [{"role": "user", "content": text}], "--chat") if self.chat else Prompt(text)

    def turns(self, shots: Sequence[tuple[str, str]], text: str, tokenizer: Any) -> Prompt:
        """Solved questions (question, answer) and then a text: in one piece, or with `chat` as a conversation."""
        if not self.chat:
            return Prompt("".join(part for shot in shots for part in shot) + text)
        messages = []
        for question, answer in shots:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer.strip()}]
        return _chat(tokenizer, [*messages, {"role": "user", "content": text}], "--chat")

    def whole(self, row: Mapping[str, Any]) -> str:
        """The text of a row {"text"}, all of which is learned; ValueError when the format cannot shape one."""
        if self.chat:
            raise ValueError('a chat template needs "input" and "target", a prompt and an answer, not "text"')
        return row["text"] if self.template == INPUT else self.text(row)

    def seen_in(self, rows: Iterable[Mapping[str, Any]]) -> PromptFormat | None:
        """The format that these rows have been put in: messages are chat; None for texts, which have no prompt."""
        pairs = [row for row in map(_example, rows) if "input" in row]
        if not pairs:
            return None
        return replace(self, chat=self.chat or all(row.conversation is not None for row in pairs))

    def problems(self, rows: Iterable[Mapping[str, Any]], tokenizer: Any = None) -> list[str]:
        """One line per reason for which rows cannot be put, before any work; without tokenizer of the fields only."""
        causes: dict[str, list[int]] = {}
        for number, row in enumerate(rows):
            try:
                if "input" not in row:
                    self.whole(row)
                elif tokenizer is None:
                    self.text(row)
                else:
                    self.prompt(row, tokenizer)
            except ValueError as error:
                causes.setdefault(str(error), []).append(number)
        return [f"{at_rows(numbers)}: {cause}" for cause, numbers in causes.items()]

    def __str__(self) -> str:
        return f"--template {self.template!r}" + (" --chat" if self.chat else "")

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> PromptFormat:
        """ValueError for what `to_json` did not write."""
        try:
            found = parse_json(text)
            return cls(str(found["template"]), bool(found["chat"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"expected a template and chat, got {text[:200]!r}") from error


def _example(row: Mapping[str, Any]) -> Example:
    return as_example(row, text=True)


def _chat(tokenizer: Any, messages: list[dict[str, str]], what: str) -> Prompt:
    """Messages through the tokenizer's chat template, up to where the answer begins."""
    if not getattr(tokenizer, "chat_template", None):
        out = "leave --chat out" if what == "--chat" else 'give the rows "input" and "target"'
        raise ValueError(f"{what}: this tokenizer has no chat template; {out}, or take the tokenizer of a chat model")
    from jinja2 import TemplateError  # of transformers, which needs it for chat templates alone

    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except TemplateError as error:
        raise ValueError(f"the tokenizer's chat template refuses these messages: {error}") from error
    return Prompt(text, special=True)


def encode(tokenizer: Any, prompt: Prompt, *, ends: Sequence[int] = (), seq2seq: bool = False) -> Any:
    """Model inputs {"input_ids", "attention_mask"} [1,T] for one prompt."""
    import torch
    from transformers import BatchEncoding

    ids = torch.tensor([prompt.some_ids(tokenizer, ends, seq2seq=seq2seq)], device="cpu")
    return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
