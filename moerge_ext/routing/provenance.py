"""Whether the experts belong to this model: what their configs say of the base, and base layers of chance."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence

from torch import nn

from ..experts.bank import ExpertBank
from ..files.listing import listed

_SNAPSHOT = re.compile(r"models--(?P<owner>[^/\\]+?)--(?P<name>[^/\\]+)[/\\]snapshots[/\\]")
_COMMIT = re.compile(r"[0-9a-f]{7,40}")


def provenance_notes(model: nn.Module, experts: ExpertBank, gate_kind: str | None) -> list[str]:
    """Lines for what may be another base, of experts or of the gates that are used, or a base layer that no checkpoint
    has."""
    notes = [other_base_note(model, experts.names, experts.bases), _fresh_layers(model, experts.modules)]
    return [note for note in (*notes, other_gates_note(model, experts, gate_kind)) if note]


def other_base_note(
    model: nn.Module, names: Sequence[str], bases: Sequence[tuple[str | None, str | None]]
) -> str | None:
    """What the experts say of their base, (`base_model_name_or_path`, `revision`), against the model's own."""
    own, commit = _own_name(model), getattr(getattr(model, "config", None), "_commit_hash", None)
    if own is None:
        return None
    others: dict[str, list[str]] = {}
    for name, (base, revision) in zip(names, bases, strict=True):
        if base and _short_name(base) != _short_name(own):
            others.setdefault(f"'{base}'", []).append(name)
        elif base and _is_commit(revision) and _is_commit(commit) and not commit.startswith(revision):
            others.setdefault(f"'{base}' at revision {revision}", []).append(name)
    if not others:
        return None
    said = "; ".join(f"{listed([repr(name) for name in who], 'expert')} on {base}" for base, who in others.items())
    at = f" at revision {commit}" if _is_commit(commit) else ""
    return f"the experts were trained on another model, if the names tell the truth: {said}; this one is '{own}'{at}"


def other_gates_note(model: nn.Module, experts: ExpertBank, kind: str | None) -> str | None:
    """What gates say of the model that they were made on, where neither the expert nor this model is called so."""
    own = _own_name(model)
    noted = experts.global_metadata.get(kind, {}) if kind is not None and own is not None else {}
    others: dict[str, list[str]] = {}
    for name, (base, _) in zip(experts.names, experts.bases, strict=True):
        made = noted.get(name, {}).get("base_model")
        if made and _short_name(made) not in {_short_name(other) for other in (own, base) if other}:
            others.setdefault(made, []).append(repr(name))
    if not others:
        return None
    said = "; ".join(f"those of {listed(who, 'expert')} on '{base}'" for base, who in others.items())
    return f"gates were made on another model, if the names tell the truth: {said}; this one is '{own}'"


def name_of_base(model: nn.Module, said: str | None) -> str | None:
    """What is written of the model beside gates that were made on it: `said`, the expert's word, if it may be this."""
    own = _own_name(model)
    return own if own is not None and (said is None or _short_name(said) != _short_name(own)) else said


def _own_name(model: nn.Module) -> str | None:
    own = getattr(getattr(model, "config", None), "_name_or_path", None)
    return os.fspath(own) or None if isinstance(own, (str, os.PathLike)) else None


def made_for(model: nn.Module, names: Sequence[str], bases: Sequence[tuple[str | None, str | None]]) -> str:
    """Which model the experts were made for and which this one is, for the first line of what does not fit."""
    own, kind = _own_name(model), type(model).__name__
    this = f"a {kind}" if own is None else f"'{own}' ({kind})"
    groups: dict[str, list[str]] = {}
    for name, (base, _) in zip(names, bases, strict=True):
        groups.setdefault(f"'{base}'" if base else "a model they do not name", []).append(repr(name))
    said = [
        f"{listed(who, 'expert')} {'was' if len(who) == 1 else 'were'} made for {base}" for base, who in groups.items()
    ]
    return f"{'; '.join(said)}; this model is {this}"


def _short_name(name: str) -> str:
    """The last part of an id or path: one model lies under many paths, and in the hub's cache."""
    cached = _SNAPSHOT.search(name + "/")
    return (cached["name"] if cached else re.split(r"[/\\]", name.rstrip("/\\"))[-1]).lower()


def _is_commit(revision: object) -> bool:
    return isinstance(revision, str) and _COMMIT.fullmatch(revision) is not None


def _fresh_layers(model: nn.Module, paths: Iterable[str]) -> str | None:
    """LoRA on a head that transformers initialised at random because the checkpoint has none.

    transformers marks what it loads; of a model that it did not load, only heads of classifiers are suspect.
    """
    heads = [path for path in paths if _is_head(model, path)]
    loaded = any(getattr(parameter, "_is_hf_initialized", False) for parameter in model.parameters())
    if not loaded and type(model).__name__.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
        return None
    fresh = [path for path in heads if not getattr(model.get_submodule(path).weight, "_is_hf_initialized", False)]
    if not fresh:
        return None
    return (
        f"the experts have a LoRA on {listed(fresh)}, whose base weights come from no checkpoint: a head that was "
        "freshly initialised differs from the one the LoRA was trained on. Load the head the experts were trained "
        "with, or leave it out with load_experts(..., modules=...)"
    )


def _is_head(model: nn.Module, path: str) -> bool:
    """Whether a plain linear layer lies outside of the transformer itself."""
    prefix = getattr(model, "base_model_prefix", "")
    return (
        bool(prefix)
        and hasattr(model, prefix)
        and not path.startswith(prefix + ".")
        and type(model.get_submodule(path)) is nn.Linear
    )
