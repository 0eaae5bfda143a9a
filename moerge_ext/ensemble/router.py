"""The router of PELMo: a text classifier that weighs the prompt experts by the question."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..evaluation.identity import of_text
from ..files.listing import listed
from ..models.prompt import PromptFormat
from .prompts import PromptExpert

ROUTER_FILE = "moerge_router.json"
FORMAT = "moerge-prompt-router"


class PromptRouter:
    """questions -> weights over the experts, PELMo, ICIC 2024, eq. 2 and 3:

        p = softmax(classifier(question)) [N];  w_e = p_e / sum of the k largest, for those k; 0 otherwise

    A question is cut at `max_length` tokens. note: how the questions and the experts were that it learned from, as
    `note_of` says it; None where nobody noted it.
    """

    note: Mapping[str, Any] | None = None

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        names: Sequence[str],
        *,
        max_length: int = 512,
        note: Mapping[str, Any] | None = None,
    ):
        self.note = note
        self.model, self.tokenizer, self.names, self.max_length = model.eval(), tokenizer, tuple(names), max_length
        outputs = model.config.num_labels
        if outputs != len(self.names):
            raise ValueError(f"the classifier has {outputs} outputs, expected one per expert: {len(self.names)}")

    @classmethod
    def load(cls, folder: str | os.PathLike, *, device: str = "cpu") -> PromptRouter:
        """A router that `train_router` saved. ValueError when the folder holds none."""
        from transformers import AutoModelForSequenceClassification

        from ..models.pretrained import load_tokenizer, usable_device

        facts = read_facts(folder)
        model = AutoModelForSequenceClassification.from_pretrained(folder).to(usable_device(device))
        options = {"max_length": facts["max_length"], "note": facts.get("asked")}
        return cls(model, load_tokenizer(str(folder)), facts["experts"], **options)

    @torch.no_grad()
    def probabilities(self, questions: Sequence[str], batch_size: int = 32) -> Tensor:
        """[M,N] float32, rows sum to 1."""
        if not questions:
            raise ValueError("no questions to route: expected at least one")
        rows = []
        device = next(self.model.parameters()).device
        for start in range(0, len(questions), batch_size):
            part = list(questions[start : start + batch_size])
            inputs = self.tokenizer(
                part, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
            )
            rows.append(self.model(**inputs.to(device)).logits.float().softmax(-1).cpu())
        return torch.cat(rows)

    def select(self, questions: Sequence[str], top_k: int) -> tuple[Tensor, Tensor]:
        """(expert ids [M,k] in descending weight, weights [M,k] summing to 1). ValueError for k outside 1 .. N."""
        return select(self.probabilities(questions), top_k)


def select(probabilities: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """probabilities [M,N] -> (ids [M,k], weights [M,k]): the k largest, renormalized."""
    count = probabilities.shape[1]
    if not 1 <= top_k <= count:
        raise ValueError(f"top_k must be between 1 and the number of experts, {count}; got {top_k}")
    weights, ids = probabilities.sort(dim=1, descending=True, stable=True)
    weights, ids = weights[:, :top_k], ids[:, :top_k]
    return ids, weights / weights.sum(1, keepdim=True)


def read_facts(folder: str | os.PathLike) -> dict[str, Any]:
    """What `train_router` wrote about a router: experts, objective, max_length, ..."""
    path = Path(folder) / ROUTER_FILE
    way_out = "train one with `moerge train-router`"
    if not path.is_file():
        raise ValueError(f"{folder} holds no router ({ROUTER_FILE} is missing): {way_out}")
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if facts["format"] != FORMAT or not all(isinstance(name, str) for name in facts["experts"]):
            raise ValueError("not its format")
        return {**facts, "max_length": int(facts["max_length"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): {way_out}") from error


def note_of(form: PromptFormat, experts: Sequence[PromptExpert] = ()) -> dict[str, Any]:
    """How questions are made of rows and put, and what each expert's prompts are made of (a digest of its facts)."""
    said = {expert.name: of_text([dict(expert.facts), expert.lora]) for expert in experts if expert.facts}
    return {"prompt": form.to_json(), "experts": said}


def warn_of_other_experts(router: PromptRouter, form: PromptFormat, experts: Sequence[PromptExpert] = ()) -> None:
    """Warn of a router that learned from questions put in another way, or from experts that ask otherwise."""
    if router.note is None:
        return
    try:
        learned = PromptFormat.from_json(router.note["prompt"])
        known = dict(router.note["experts"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the router's note of its training cannot be read ({error}): train it again") from error
    lines = [f"it was trained with {learned}, and is asked with {form}"] if learned != form else []
    now = note_of(form, experts)["experts"]
    others = [name for name in now if name in known and now[name] != known[name]]
    if others:
        lines.append(f"it was trained on the answers of other prompts of {listed(others, 'expert')}")
    if lines:
        warnings.warn("the router may not fit: " + "; ".join(lines), stacklevel=3)
