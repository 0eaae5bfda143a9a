"""Prompt experts from a JSON file, for the commands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..files.rows import read_json, read_rows, read_text
from ..queries.embedder import Embedder
from ..queries.vectors import unit
from .prompts import (
    DEMONSTRATIONS,
    PromptExpert,
    Retriever,
    Template,
    answer_prompting,
    chain_of_thought,
    check_experts,
    few_shot,
    retrieval_augmented,
)

KINDS = ("few-shot", "chain-of-thought", "retrieval", "answer-prompting")
_KEYS = {"name", "kind", "demonstrations", "count", "template", "lora", "passages", "passage_count", "samples"}


def read_experts(path: Path, make_embedder: Callable[[], Embedder]) -> tuple[list[PromptExpert], dict[str, Path]]:
    """(experts, {LoRA name: folder}) of a file that holds a list of objects:

        {"name": ..., "kind": "few-shot" | "chain-of-thought" | "retrieval" | "answer-prompting",
         "demonstrations": "rows.jsonl", "count": 16, "lora": "adapters/sql", "template": {"question": ..., ...},
         "passages": "passages.txt", "passage_count": 10, "samples": 10}

    Only the name is needed (few-shot; count 0 without demonstrations). Paths are relative to the file; passages are
    one per line, searched with `make_embedder()`. ValueError lists every problem of every expert.
    """
    entries = read_entries(path)
    experts, loras, problems = [], {}, []
    for entry in entries:
        try:
            experts.append(_expert(entry, path.parent, loras, make_embedder))
        except ValueError as error:
            problems.append(f"expert {entry['name']!r}: {error}")
    if problems:
        raise ValueError(f"{path} cannot be used:\n- " + "\n- ".join(problems))
    check_experts(experts)
    return experts, loras


def read_entries(path: Path) -> list[dict[str, Any]]:
    """The objects of the file, each with a name; ValueError when it holds anything else."""
    entries = read_json(path, "a list of prompt experts, see docs/ensemble.md")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{path} must hold a list of objects, one per prompt expert")
    nameless = [i for i, entry in enumerate(entries) if not isinstance(entry.get("name"), str) or not entry["name"]]
    if nameless:
        raise ValueError(f'{path}: expected a "name" for every expert; number {nameless[0]} (from 0) has none')
    return entries


def _expert(entry: dict[str, Any], root: Path, loras: dict[str, Path], make_embedder) -> PromptExpert:
    unknown = sorted(set(entry) - _KEYS)
    if unknown:
        raise ValueError(f"unknown key(s) {', '.join(unknown)}; expected {', '.join(sorted(_KEYS))}")
    name, kind = entry["name"], entry.get("kind", KINDS[0])
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    rows = read_rows(root / entry["demonstrations"]) if "demonstrations" in entry else []
    words = entry.get("template", {})
    known = {f.name for f in fields(Template)}
    if not isinstance(words, dict) or set(words) - known:
        raise ValueError(f"template takes {', '.join(sorted(known))}, got {words!r}")
    common: dict[str, Any] = {"count": entry.get("count", DEMONSTRATIONS if rows else 0), "template": Template(**words)}
    if "lora" in entry:
        folder = root / entry["lora"]
        common["lora"] = folder.name
        loras[folder.name] = folder
    if kind == "chain-of-thought":
        return chain_of_thought(name, rows, **common)
    if kind == "answer-prompting":
        return answer_prompting(name, rows, samples=entry.get("samples", 10), **common)
    if kind == "retrieval":
        if "passages" not in entry:
            raise ValueError('kind "retrieval" needs "passages", a text file with one passage per line')
        file = root / entry["passages"]
        if not file.is_file():
            raise ValueError(f"there is no file {file}: expected one passage per line")
        lines = read_text(file).splitlines()
        retriever = nearest_passages(make_embedder(), [line for line in lines if line.strip()])
        return retrieval_augmented(name, retriever, rows, passages=entry.get("passage_count", 10), **common)
    return few_shot(name, rows, **common)


def nearest_passages(embedder: Embedder, passages: list[str]) -> Retriever:
    """A retriever: all `passages`, those most similar to the question first. ValueError when there are none."""
    if not passages:
        raise ValueError("no passages to retrieve from")
    index = unit(embedder(passages))

    def retrieve(question: str) -> list[str]:
        order = (index @ unit(embedder([question]))[0]).argsort(descending=True)
        return [passages[i] for i in order.tolist()]

    return retrieve
