"""What is compared: a method with its options, the base alone, or a baseline made from other runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..methods import METHODS, get_method
from ..methods.fixed import PREFIX
from ..methods.option_text import ALL, parse_option

BASE = "base"  # the model without experts
PELMO = "pelmo:"  # an ensemble of prompts and the file that describes it
WHOLE = "model:"  # another model, and its folder
MULTITASK = "multitask"  # one LoRA, trained on the data of all experts
DERIVED = {
    "oracle_dataset": "the best single expert of every evaluation set, chosen on that set: it bounds whoever picks one "
    "expert per set, not routing per token",
    "best_individual": "the one expert with the best mean over all evaluation sets, chosen on them",
}
LISTS = ("preference", "without")  # options of methods whose values have commas
ROWS = (BASE, *DERIVED, f"{PELMO}FILE", f"{WHOLE}DIR")  # what a table takes besides methods

# GLIDER, arXiv 2410.07172, the paper's ablations: a constant alpha, top-k, and top-p instead of top-k
ALPHAS, TOP_KS, TOP_PS = (1, 3, 10, 100, 1000, 3000), (1, 2, 3), (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Run:
    """One row of the table. `method` is None for the base, for an ensemble, which the file `ensemble` describes, and
    for another model, which lies in the folder `model`. placing: `missing` and `absent` of `patch`."""

    label: str
    method: str | None
    options: dict[str, Any] = field(default_factory=dict)
    ensemble: str | None = None
    model: str | None = None
    placing: dict[str, str] = field(default_factory=dict)

    @property
    def apart(self) -> bool:
        """Whether somebody else than the base, or a patched base, answers: `evaluate(answerers=...)` has who."""
        decodes = self.method is not None and get_method(self.method).decodes
        return decodes or self.ensemble is not None or self.model is not None


def split_methods(text: str) -> list[str]:
    """The rows of `--methods`, one after each comma but those in an option's list: "mole/without=ant,bee,base"."""
    found: list[str] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        option = found[-1].rpartition("/")[2].partition("=")[0] if found else None
        if option in LISTS and not _is_row(part.partition("/")[0]):
            found[-1] += f",{part}"
        else:
            found.append(part)
    return found


def _is_row(name: str) -> bool:
    return name == BASE or name in DERIVED or name in METHODS or name.startswith((PREFIX, PELMO, WHOLE))


def parse_run(text: str) -> Run:
    """ "glider_code/alpha=10/top_k=1" -> the method with those options; "base" -> the model alone.

    "model:DIR": another model. "pelmo:FILE/top_k=2" and "pelmo:FILE/expert=NAME": the ensemble of prompts that FILE
    describes, one of its experts.
    """
    if text.strip().startswith(PELMO):
        return _ensemble_run(text.strip())
    if text.strip().startswith(WHOLE):
        if not (folder := text.strip().removeprefix(WHOLE)):
            raise ValueError(f"expected {WHOLE}DIR, the folder or hub id of a model, got {text!r}")
        return Run(text.strip(), None, model=folder)
    name, *options = text.strip().split("/")
    if name == BASE:
        if options:
            raise ValueError(f"'{BASE}' takes no options, got {text!r}")
        return Run(BASE, None)
    given = dict(parse_option(option) for option in options)
    get_method(name, ROWS).configure(**given)
    return Run(text.strip(), name, given)


def _ensemble_run(text: str) -> Run:
    parts = text.removeprefix(PELMO).split("/")
    known = [part for part in parts if part.partition("=")[0] in ("top_k", "expert") and "=" in part]
    path = "/".join(parts[: len(parts) - len(known)])
    options = dict(part.split("=", 1) for part in known)
    top_k = options.get("top_k", "1")
    if (
        not path
        or parts[len(parts) - len(known) :] != known
        or len(options) > 1
        or not top_k.isdecimal()
        or top_k == "0"
    ):
        raise ValueError(
            f"expected {PELMO}FILE, {PELMO}FILE/top_k=K with K at least 1, or {PELMO}FILE/expert=NAME, got {text!r}"
        )
    return Run(text, None, options, path)


def with_top_k(texts: Sequence[str], top_k: int | str | None) -> list[str]:
    """The texts of `--methods` under `--top-k`, which every method that routes gets, unless it sets its own.

    The name of a method that has this top_k anyway stays as it is. ValueError when no method routes.
    """
    if top_k is None:
        return list(texts)
    made, routed = [], False
    for text in texts:
        name, *options = text.split("/")
        alone = name == BASE or name in DERIVED or name.startswith((PELMO, WHOLE))
        routing = None if alone else get_method(name).routing
        routed |= routing is not None
        given = any(option.partition("=")[0] == "top_k" for option in options)
        same = routing is None or routing.top_k == (None if top_k == ALL else top_k)
        made.append(text if given or same else f"{text}/top_k={top_k}")
    if not routed:
        raise ValueError(f"--top-k {top_k}: of the methods {', '.join(texts) or '(none)'} no one routes")
    return made


def check_named(texts: Iterable[str]) -> None:
    """ValueError for a method that there is not, or an option that it does not take, whatever the experts are."""
    for text in texts:
        if text not in DERIVED:
            parse_run(text)


def parse_runs(
    texts: Sequence[str], names: Sequence[str], top_k: int | str | None = None
) -> tuple[list[Run], list[str]]:
    """(runs, derived baselines) of `--methods`; derived ones bring `expert:<name>` runs of every expert with them.

    top_k: of `--top-k`, which is too large for fewer experts also where it is a method's own; that one would take all.
    """
    if isinstance(top_k, int) and top_k > len(names):
        raise ValueError(f"top_k={top_k} is more than the number of experts, E={len(names)}")
    runs: dict[str, Run] = {}
    derived = [text for text in texts if text in DERIVED]
    wanted = [text for text in texts if text not in DERIVED]
    wanted += [PREFIX + name for name in names] if derived else []
    for text in wanted:
        run = parse_run(text)
        if run.method is not None and run.method.startswith(PREFIX) and run.method[len(PREFIX) :] not in names:
            raise ValueError(f"no expert named '{run.method[len(PREFIX) :]}'; there are: {', '.join(names)}")
        runs.setdefault(run.label, run)
    return list(runs.values()), derived


def ablation(method: str, num_experts: int) -> list[str]:
    """The rows of GLIDER's ablations for `glider` or `glider_code`: alpha, top-k (up to E), top-p."""
    if method not in ("glider", "glider_code"):
        raise ValueError(f"--ablation is for glider and glider_code, got {method!r}")
    alpha = "glider/gamma=0/beta={}" if method == "glider" else "glider_code/alpha={}"
    rows = [alpha.format(value) for value in ALPHAS]
    rows += [f"{method}/top_k={k}" for k in TOP_KS if k <= num_experts]
    return rows + [f"{method}/top_k=none/top_p={p}" for p in TOP_PS]
