"""The prompt format that an expert and its gates were trained with, noted in the headers of their files."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path

from ..files.listing import listed
from ..files.safefile import open_tensors
from ..models.prompt import PromptFormat
from .bank import ExpertBank
from .kinds import PROMPT_KEY

_FILES = ("adapter_model.safetensors", "moerge_gates*.safetensors")


def note_of_prompt(prompt: PromptFormat | None) -> dict[str, str]:
    """The entry of a header; nothing for a format that is not known."""
    return {} if prompt is None else {PROMPT_KEY: prompt.to_json()}


def noted_prompts(folder: Path) -> dict[str, PromptFormat]:
    """{file name: the format noted in it} of an expert's folder, or one file; empty where nobody noted one."""
    found = {}
    files = [folder] if folder.is_file() else sorted(path for pattern in _FILES for path in folder.glob(pattern))
    for path in files:
        try:
            with open_tensors(path) as opened:
                text = (opened.metadata() or {}).get(PROMPT_KEY)
            if text is not None:
                found[path.name] = PromptFormat.from_json(text)
        except (ValueError, OSError):  # a note is a help: what can be loaded without it is used without it
            continue
    return found


def warn_of_other_prompts(experts: ExpertBank, asked: Iterable[PromptFormat | None]) -> None:
    """Warn of experts, or gates, that were trained with another prompt format than those they are asked with."""
    asked = {form for form in asked if form is not None}
    others: dict[PromptFormat, list[str]] = {}
    for name in experts.names:
        noted: dict[str, PromptFormat] = {}
        for place in reversed(experts.places(name) if asked else []):  # gates from elsewhere replace those beside it
            noted |= noted_prompts(place)
        for form in dict.fromkeys(noted.values()):
            if asked != {form}:
                files = [file for file, other in noted.items() if other == form]
                others.setdefault(form, []).append(name if len(files) == len(noted) else f"{name} ({', '.join(files)})")
    if others:
        these = " and ".join(sorted(map(str, asked)))
        lines = [f"\n- {form}: {listed(names, 'expert')}" for form, names in others.items()]
        warnings.warn(
            f"experts are asked with another prompt ({these}) than they were trained with:" + "".join(lines),
            stacklevel=3,
        )
