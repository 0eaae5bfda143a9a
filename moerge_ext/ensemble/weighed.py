"""Any router of texts as the router of an ensemble: next-token probabilities mixed with its weights.

"What the Weight?" (arXiv 2401.12756) calls it `ensemble`, beside the average of parameters that its rows take:

    p(v | x) = sum_e w_e(x) p_e(v | x)          p_e: the model with expert e alone
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..methods import get_method
from ..queries.router import Router
from .prompts import PromptExpert
from .router import select


def plain_experts(names: Sequence[str]) -> list[PromptExpert]:
    """LoRA experts that are given the question as it is."""
    return [PromptExpert(name, lambda question, ask: question, lora=name) for name in names]


class WeighedExperts:
    """`router` of a `PromptEnsemble` over the LoRA experts of a handle patched with method "given":

        weighed = WeighedExperts(router, "weight_tfidf")
        PromptEnsemble(model, tokenizer, plain_experts(handle.names), weighed, handle=handle)

    router: of the method's kind; options: the method's own, such as keep. Weights are divided by their sum; ValueError
    for a text to which no expert gets a positive weight.
    """

    note = None  # it learned from no answers of prompts

    def __init__(self, router: Router, method: str, **options: Any):
        self.method = get_method(method)
        self.options: Mapping[str, Any] = self.method.configure(**options)[2]
        self.router, self.names = router, tuple(router.names)

    def probabilities(self, questions: Sequence[str]) -> Tensor:
        """[M,E] float32, rows sum to 1."""
        weights = self.router.bias(list(questions), self.method, self.options, self.names).clamp_min(0)
        weights = weights.expand(len(questions), -1)  # one row for all, when the method decides for a task
        if not (weights.sum(1) > 0).all():
            raise ValueError(
                f"method '{self.method.name}' leaves a text to the base: an ensemble needs an expert for each"
            )
        return weights / weights.sum(1, keepdim=True)

    def select(self, questions: Sequence[str], top_k: int) -> tuple[Tensor, Tensor]:
        """(expert ids [M,k] in descending weight, weights [M,k] summing to 1)."""
        return select(self.probabilities(questions), top_k)
