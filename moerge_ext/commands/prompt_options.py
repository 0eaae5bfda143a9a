"""The options that say how a row becomes the text that a model is given; the same in every command."""

from __future__ import annotations

import argparse
from typing import Any

from ..models.prompt import INPUT, PromptFormat


def add_prompt(parser: Any) -> None:
    """Declare them."""
    add = parser.add_argument_group("the text that the model is given").add_argument
    add(
        "--template",
        metavar="TEXT",
        default=INPUT,
        help="{field} is a field of the row, {instruction} also that of the task's meta.json; \\n is a line end "
        "(default: %(default)s)",
    )
    add("--chat", action="store_true", help="put it, as the user's message, through the tokenizer's chat template")


def prompt_of(args: argparse.Namespace) -> PromptFormat:
    """The format of the arguments; ValueError for a template without a field."""
    return PromptFormat(args.template.replace("\\n", "\n"), args.chat)


def check_chat(form: PromptFormat, tokenizer: Any) -> None:
    """ValueError for --chat and a tokenizer that has no chat template."""
    form.around("", tokenizer)
