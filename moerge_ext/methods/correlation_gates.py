"""PEMT: weights from how a task's prompt correlates with the experts' prompts, and a new expert for the task.

    P'  = P + sum_e softmax(P P_e^T) P_e                     P [L,D]: the task's prompt; P_e [L_e,D]: expert e's
    c   = the mean of P' over its L rows, divided by its root mean square                                    [D]
    w   = softmax(G c)                                       G [E,D], one for each module, from zeros: all experts alike
    y_t = W u_t + sum_e w_e B_e A_e u_t + B' A' u_t          A' [r,D], B' [O,r]: the task's LoRA

P, G, A' and B' are trained, by the model's loss plus `sparsity` (0.1) times the mean over modules of

    sum_e w_e (1 - cos(y, z_e))                              z_e = B_e A_e u; all tokens as one vector

P begins as the base's embeddings of the words that say what the task asks for (`description`), and P_e is the same of
what `moerge describe` wrote of expert e, and stays. The file keeps both.

Where paper, survey and code differ, and what this row does:

- The code puts P' in front of the input and gives the gates the mean of its hidden states at each layer, so that in its
  encoder the weights depend on the input as well; the survey says Task and has gates on the correlation itself. Here
  P' is not put before anything: it reaches the model through the gates alone, and the weights are those of the task.
  The root mean square stands for the norm that a layer's input has passed.
- The paper trains P_e with the experts in its first stage, from the embeddings of a description; experts found
  elsewhere have none, so here P_e stays as it begins.
- Its experts are LoRAs at the second linear layer of every feed-forward block, and the task's is a bottleneck adapter
  behind that block; here experts are wherever they were trained, and the task's is a LoRA beside them (`task_rank` 16).
- It trains the base's layer norms too; here the base is frozen. Its dropout of 0.1 on the softmax is left out.
- P P_e^T is not scaled, 0.1 and the rate 3e-4 are the code's; 500 steps are ours. Of the paper the abstract alone could
  be had: whether the added loss is what it calls Task Sparsity Loss was not checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .base import Method, is_integer
from .learned import Learned, learned_plan
from .survey import SURVEY
from .weighing import Place, TaskLora, Weigher


class TaskPrompts(Weigher):
    """The prompts of the task and of E experts, which all modules' gates have in common.

    target [L,D]; sources [E,M,D], padded to the longest; real [E,M]: 1 where a row of a source is none of the padding.
    """

    fixed = ("sources", "real")
    _kept: tuple[Tensor, Tensor] | None = None  # (the target it is of, c), once nothing is trained

    @classmethod
    def begin(cls, target: Tensor, sources: list[Tensor]) -> dict[str, Tensor]:
        """The tensors, of prompts [L,D] and E times [L_e,D]."""
        rows = [torch.ones(len(source), dtype=torch.float32, device="cpu") for source in sources]
        pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
        return {"target": target.float(), "sources": pad(sources).float(), "real": pad(rows)}

    @classmethod
    def check(cls, tensors: Mapping[str, Tensor], place: Place) -> None:
        """ValueError for tensors that are no prompts of `place.experts` experts and `place.width` features."""
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        length, longest = (found.get("target") or (0,))[0], (found.get("real") or (0,))[-1]
        wanted = {
            "target": (length, place.width),
            "sources": (place.experts, longest, place.width),
            "real": (place.experts, longest),
        }
        if found != wanted or not length or not longest:
            said = ", ".join(f"{name} {list(shape)}" for name, shape in found.items()) or "none"
            raise ValueError(
                f"expected prompts of {place.experts} experts for a base of width {place.width}: target "
                f"[L,{place.width}], sources [{place.experts},M,{place.width}], real [{place.experts},M]; the file's "
                f"are {said}: train them again"
            )

        if not tensors["real"].any(1).all():
            raise ValueError("the prompt of an expert has no token: describe it again")

    def correlation(self) -> Tensor:
        """c [D]."""
        if self.target.requires_grad:
            return self._correlation()
        if self._kept is None or self._kept[0] is not self.target:
            self._kept = (self.target, self._correlation())
        return self._kept[1]

    def _correlation(self) -> Tensor:
        scores = torch.einsum("ld,emd->elm", self.target, self.sources)
        shares = scores.masked_fill(self.real[:, None] == 0, -torch.inf).softmax(-1)
        mean = (self.target + torch.einsum("elm,emd->ld", shares, self.sources)).mean(0)
        return mean / mean.square().mean().sqrt().clamp_min(1e-6)


class CorrelationGate(TaskLora):
    """softmax(gate c), the same for every token; and the task's LoRA. `common`: the `TaskPrompts`."""

    @classmethod
    def shapes(cls, place: Place, options: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        return {"gate": (place.experts, place.common)} | super().shapes(place, options)

    def scores(self, x: Tensor, bank: Any) -> Tensor:
        c = self.common.correlation().to(x.device, x.dtype)
        return functional.linear(c, self.gate.to(x.dtype)).expand(len(x), -1)


def check_pemt(method: str, options: Mapping[str, Any]) -> None:
    """ValueError for a description that is no text, and a size that is none."""
    said, rank = options["description"], options["task_rank"]
    if not (said is None or (isinstance(said, str) and said.strip())):
        raise ValueError(f"method '{method}': description must say what the task asks for, got {said!r}")
    if not (is_integer(rank) and rank >= 1):
        raise ValueError(f"method '{method}': task_rank must be a positive integer, got {rank!r}")


CORRELATED = Learned(
    weigher=CorrelationGate,
    common=TaskPrompts,
    kept=("description", "task_rank"),
    check=check_pemt,
    training={"steps": 500, "lr": 3e-4, "sparsity": 0.1},
)
PEMT = Method(
    name="pemt",
    summary="softmax(G c), c how the task's prompt correlates with the experts'; a new expert beside them",
    paper="PEMT: Multi-Task Correlation Guided Mixture-of-Experts Enables Parameter-Efficient Transfer Learning, arXiv "
    "2402.15082, section 3",
    taxonomy=SURVEY[19].taxonomy,
    plan=partial(learned_plan, method="pemt", learned=CORRELATED),
    routing=None,
    options={"routers": None, "description": None, "task_rank": 16},
    learned=CORRELATED,
    survey=19,
    differs="the prompts steer the gates and are not put before the input; the experts' are of their descriptions",
)

ROWS = (PEMT,)
