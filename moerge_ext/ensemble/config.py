"""An ensemble from a JSON file: its prompt experts, the few-shot baseline beside them, its router."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from ..files.counting import counted
from ..files.meta import read_instructed_rows
from ..files.rows import read_json
from ..models.prompt import PromptFormat
from ..queries.embedder import Embedder
from .passages import SIMILARITIES, PassageIndex, read_passages
from .prompts import (
    DEMONSTRATIONS,
    PASSAGES,
    SAMPLES,
    PromptExpert,
    answer_prompting,
    chain_of_thought,
    check_experts,
    few_shot,
    retrieval_augmented,
)
from .template import Template

KINDS = ("few-shot", "chain-of-thought", "retrieval", "answer-prompting")
_OWN = {
    "retrieval": {
        "passages", "passage_count", "demonstration_passages", "similarity", "embedder", "mean_pool", "embedder_prefix"
    },
    "answer-prompting": {"samples", "demonstration_samples", "sample_tokens"},
}  # fmt: skip
_KEYS = {"name", "kind", "demonstrations", "count", "seed", "template", "lora", "dataset"}
_TEXTS = ("demonstrations", "lora", "passages", "similarity", "embedder", "embedder_prefix")
_NUMBERS = {
    "count": 0,
    "seed": 0,
    "passage_count": 1,
    "demonstration_passages": 0,
    "samples": 1,
    "demonstration_samples": 0,
    "sample_tokens": 1,
}
_PARTS = {"experts", "few_shot", "router", "top_k", "stop", "answer_after", "max_new_tokens"}
BASELINE = "specific few-shot"  # section 3.3


@dataclass(frozen=True)
class Config:
    """What a file says.

    experts; loras: {LoRA name: folder}; by_dataset: {dataset: the expert that is made for it}; few_shot: {dataset: the
    baseline's expert, which is not of the pool}. router: its folder, or None; top_k of the ensemble; stop: texts that
    end an answer; answer_after: what stands before the answer that is judged; max_new_tokens: None leaves it open.
    """

    experts: list[PromptExpert]
    loras: dict[str, Path]
    by_dataset: dict[str, str] = field(default_factory=dict)
    few_shot: dict[str, PromptExpert] = field(default_factory=dict)
    router: Path | None = None
    top_k: int = 2
    stop: tuple[str, ...] = ()
    answer_after: str | None = None
    max_new_tokens: int | None = None

    @property
    def names(self) -> list[str]:
        return [expert.name for expert in self.experts]


RowsOf = Callable[[str], list[dict[str, Any]]]  # the name of a file -> its rows
MakeEmbedder = Callable[[Mapping[str, Any]], Embedder]  # an expert's "embedder", "mean_pool", "embedder_prefix" -> it


def read_experts(path: Path, make_embedder: MakeEmbedder, form: PromptFormat | None = None) -> Config:
    """The ensemble of a file: a list of experts, or {"experts": [...]} with the other parts of docs/ensemble.md.

    An expert:

        {"name": ..., "kind": "few-shot" | "chain-of-thought" | "retrieval" | "answer-prompting",
         "demonstrations": "rows.jsonl", "count": 16, "seed": 0, "dataset": "nq", "lora": "adapters/sql",
         "template": {"question": ..., ...},
         "passages": "passages.txt", "passage_count": 10, "demonstration_passages": 10, "similarity": "cosine" | "dot",
         "embedder": MODEL, "mean_pool": false, "embedder_prefix": "",
         "samples": 10, "demonstration_samples": 10, "sample_tokens": 32}

    Only the name is needed (few-shot; count 0 without demonstrations). Paths are relative to the file; passages are
    searched with `make_embedder(expert)`, which is called for those alone. The inputs of demonstrations are made by the
    template of `form`, as those of the questions are. ValueError lists every problem.
    """
    parts, form = read_parts(path), form or PromptFormat()
    rows_of = partial(_rows, path.parent, form)
    experts, loras, problems = [], {}, []
    for entry in parts["experts"]:
        try:
            experts.append(_expert(entry, path.parent, rows_of, loras, make_embedder))
        except ValueError as error:
            problems.append(f"expert {entry['name']!r}: {error}")
    baseline = {}
    try:
        baseline = _few_shot(parts.get("few_shot"), rows_of)
    except ValueError as error:
        problems.append(f"few_shot: {error}")
    if problems:
        raise ValueError(f"{path} cannot be used:\n- " + "\n- ".join(problems))
    check_experts(experts)
    return Config(
        experts,
        loras,
        {entry["dataset"]: entry["name"] for entry in parts["experts"] if "dataset" in entry},
        baseline,
        path.parent / parts["router"] if "router" in parts else None,
        parts.get("top_k", min(2, len(experts))),
        tuple(parts.get("stop", ())),
        parts.get("answer_after"),
        parts.get("max_new_tokens"),
    )


def read_parts(path: Path) -> dict[str, Any]:
    """The object of the file, of a list {"experts": list}, without what its paths hold; ValueError lists problems."""
    parts = read_json(path, "a list of prompt experts, see docs/ensemble.md")
    parts = {"experts": parts} if isinstance(parts, list) else parts
    entries = parts.get("experts") if isinstance(parts, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f'{path} must hold a list of objects, one per prompt expert, or {{"experts": that list}}')
    nameless = [i for i, entry in enumerate(entries) if not isinstance(entry.get("name"), str) or not entry["name"]]
    if nameless:
        raise ValueError(f'{path}: expected a "name" for every expert; number {nameless[0]} (from 0) has none')
    problems = [f"unknown part {key!r}; expected {', '.join(sorted(_PARTS))}" for key in sorted(set(parts) - _PARTS)]
    stop = parts.get("stop", [])
    if not isinstance(stop, list) or not all(isinstance(text, str) and text for text in stop):
        problems.append(f"stop must be a list of texts, got {stop!r}")
    for key in ("router", "answer_after"):
        if key in parts and (not isinstance(parts[key], str) or not parts[key]):
            problems.append(f"{key} must be a text, got {parts[key]!r}")
    for key in ("top_k", "max_new_tokens"):
        if key in parts and (not isinstance(parts[key], int) or parts[key] < 1):
            problems.append(f"{key} must be a number of at least 1, got {parts[key]!r}")
    if isinstance(parts.get("top_k"), int) and parts["top_k"] > len(entries):
        there = f"there {'is' if len(entries) == 1 else 'are'} {counted(len(entries), 'expert')}"
        problems.append(f"top_k is {parts['top_k']}, and {there}")
    datasets = [entry["dataset"] for entry in entries if "dataset" in entry]
    twice = [name for name in dict.fromkeys(map(str, datasets)) if list(map(str, datasets)).count(name) > 1]
    if twice or not all(isinstance(name, str) for name in datasets):
        problems.append(f'"dataset" names the one expert that is made for it, a text; got {twice or datasets}')
    if problems:
        raise ValueError(f"{path} cannot be used:\n- " + "\n- ".join(problems))
    return parts


def _rows(root: Path, form: PromptFormat, file: str) -> list[dict[str, Any]]:
    """The rows of a file; ValueError for one that is not there, and for rows that the template cannot take."""
    rows = read_instructed_rows(root / file)
    if problems := form.problems(rows):
        raise ValueError(f"{root / file}: " + "; ".join(problems))
    return [{**row, "input": form.text(row)} for row in rows]


def _expert(
    entry: dict[str, Any], root: Path, rows_of: RowsOf, loras: dict[str, Path], make_embedder: MakeEmbedder
) -> PromptExpert:
    name, kind = entry["name"], entry.get("kind", KINDS[0])
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    known = _KEYS | _OWN.get(kind, set())
    unknown = sorted(set(entry) - known)
    if unknown:
        raise ValueError(f"unknown key(s) {', '.join(unknown)} of kind {kind!r}; expected {', '.join(sorted(known))}")
    _check_values(entry)
    rows = rows_of(entry["demonstrations"]) if "demonstrations" in entry else []
    common: dict[str, Any] = {"count": entry.get("count", DEMONSTRATIONS if rows else 0), "seed": entry.get("seed", 0)}
    common["template"] = _template(entry)
    if "lora" in entry:
        folder = root / entry["lora"]
        common["lora"] = folder.name
        loras[folder.name] = folder
    if kind == "chain-of-thought":
        return chain_of_thought(name, rows, **common)
    if kind == "answer-prompting":
        common |= {key: entry.get(key) for key in ("demonstration_samples", "sample_tokens")}
        return answer_prompting(name, rows, samples=entry.get("samples", SAMPLES), **common)
    if kind == "retrieval":
        common["demonstration_passages"] = entry.get("demonstration_passages")
        count = entry.get("passage_count", PASSAGES)
        return retrieval_augmented(name, _retriever(entry, root, count, make_embedder), rows, passages=count, **common)
    return few_shot(name, rows, **common)


def _check_values(entry: Mapping[str, Any]) -> None:
    """ValueError for a path or text that is none, and for a number that is none or too small."""
    wrong = [f"{key} must be a text, got {entry[key]!r}" for key in _TEXTS if not isinstance(entry.get(key, ""), str)]
    for key, least in _NUMBERS.items():
        value = entry.get(key, least)
        if not isinstance(value, int) or value < least:
            wrong.append(f"{key} must be a whole number of at least {least}, got {value!r}")
    if wrong:
        raise ValueError("; ".join(wrong))


def _template(entry: Mapping[str, Any]) -> Template:
    words, known = entry.get("template", {}), {f.name for f in fields(Template)}
    fine = isinstance(words, dict) and not set(words) - known and all(isinstance(text, str) for text in words.values())
    if not fine:
        raise ValueError(f"template takes {', '.join(sorted(known))}, each a text, got {words!r}")
    return Template(**words)


def _retriever(entry: Mapping[str, Any], root: Path, count: int, make_embedder: MakeEmbedder) -> Any:
    if "passages" not in entry:
        raise ValueError(
            'kind "retrieval" needs "passages": a text file with one passage per line, or JSON lines {"input", '
            '"passages"} of what was found for each question'
        )
    passages = read_passages(root / entry["passages"])
    if not isinstance(passages, list):
        return passages
    if (similarity := entry.get("similarity", "cosine")) not in SIMILARITIES:
        raise ValueError(f"similarity must be one of {', '.join(SIMILARITIES)}, got {similarity!r}")
    count = max(count, entry.get("demonstration_passages", 0))
    return PassageIndex(make_embedder(entry), passages, count=count, similarity=similarity)


def _few_shot(said: Any, rows_of: RowsOf) -> dict[str, PromptExpert]:
    """{dataset: expert} of {"demonstrations": {dataset: file}, "count": 16, "seed": 0, "template": {...}}."""
    if said is None:
        return {}
    files = said.get("demonstrations") if isinstance(said, dict) else None
    known = {"demonstrations", "count", "seed", "template"}
    if not isinstance(files, dict) or set(said) - known or not all(isinstance(file, str) for file in files.values()):
        raise ValueError(
            'expected {"demonstrations": {dataset: file}} and perhaps "count", "seed", "template", got '
            f"{said!r:.200}"
        )
    _check_values({key: value for key, value in said.items() if key != "demonstrations"})
    options = {"count": said.get("count", DEMONSTRATIONS), "seed": said.get("seed", 0), "template": _template(said)}
    return {name: few_shot(f"{BASELINE} {name}", rows_of(file), **options) for name, file in files.items()}
