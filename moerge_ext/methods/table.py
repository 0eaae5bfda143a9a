"""`moerge methods`: the rows of METHODS as plain data and as tables for a terminal."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from . import METHODS, get_method
from .base import Method
from .fixed import PREFIX, fixed_expert
from .whole_models import ROWS, WHOLE_MODELS, WholeModels

SURVEY = "MoErging survey, arXiv 2408.07057"

TAXONOMY_HEADERS = {
    "expert_training": "expert\ntraining",
    "expert_data": "expert\ndata",
    "routing_dataset": "routing\ndataset",
    "input_granularity": "input\ngrain",
    "depth": "depth",
    "selection": "selec-\ntion",
    "aggregation": "aggre-\ngation",
    "generalization": "general-\nization",
    "user_dataset": "user\ndataset",
}
_ANY = "<name>"
_FIXED = PREFIX + _ANY
SHORT = {"Out-of-Distribution": "OOD", "In-Distribution": "ID"}


def rows() -> list[dict[str, Any]]:
    """One dict per method, in the table's order, then `expert:<name>` and the methods of whole models; all strings but
    for `taxonomy`.

    Keys: name, summary, gates (the kind it needs, or "none"), top_k ("2", "all", "-"), weighting ("fixed" if nothing is
    routed, "trained" if a router of its own weighs all experts), aggregation ("output" or "factored": how the selected
    are applied), options ("name=default, ..."), routing (the options of `route`, likewise), embedder (the paper's, or
    "-"), taxonomy (a dict with the fields of `Taxonomy`), survey (n of the survey's section 3.n, or "-"), differs (from
    the paper or survey, or "-"), paper.
    """
    return [_row(method) for method in (*METHODS.values(), fixed_expert(_ANY))] + list(map(_whole, ROWS))


def _row(method: Method) -> dict[str, Any]:
    routing = method.routing
    top_k = "-" if routing is None else "all" if routing.top_k is None else str(routing.top_k)
    return {
        "name": method.name,
        "summary": method.summary,
        "gates": method.gate_kind or "none",
        "top_k": top_k,
        "weighting": ("trained" if method.learned is not None else "fixed") if routing is None else routing.weighting,
        "aggregation": method.aggregation,
        "options": _listed(method.options) or "-",
        "routing": _listed(_routing(method)),
        "embedder": method.embedder or "-",
        "taxonomy": asdict(method.taxonomy),
        "survey": "-" if method.survey is None else str(method.survey),
        "differs": method.differs or "-",
        "paper": method.paper,
    }


def _whole(row: WholeModels) -> dict[str, Any]:
    values = {name: getattr(row, name) for name in ("name", "summary", "top_k", "weighting", "aggregation")}
    values |= {"gates": "none", "options": "-", "routing": row.made, "embedder": "-", "survey": str(row.survey)}
    return values | {"taxonomy": asdict(row.taxonomy), "differs": row.differs, "paper": row.paper}


def _routing(method: Method) -> dict[str, Any]:
    """The options that `patch` hands to `route`, and how the selected experts are applied."""
    shown = {} if method.routing is None else {f.name: getattr(method.routing, f.name) for f in fields(method.routing)}
    if callable(shown.get("scale")):
        shown["scale"] = "by D and E"
    return shown | {"aggregation": method.aggregation}


def _listed(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in options.items())


def render(console: Console, *, verbose: bool = False, names: Sequence[str] = ()) -> None:
    """Print the methods; `verbose` adds the survey's taxonomy, the options, embedders and papers.

    names: print these alone, with all that `verbose` adds. ValueError for a name of no method.
    """
    data = rows()
    if names:
        data, verbose = _named(data, names), True
    else:
        console.print(
            f"[bold]{len(METHODS)} routing methods[/bold] and expert:<name> (patch(model, experts, method=...)), and "
            f"{', '.join(WHOLE_MODELS)} of whole models (docs/whole_models.md)",
            highlight=False,
        )
    table = _table("method", "what it does", "gates", "top-k", "weights", "applied", "arXiv", wraps="what it does")
    for row in data:
        arxiv = re.search(r"arXiv (\d+\.\d+)", row["paper"])
        table.add_row(
            *(row[key] for key in ("name", "summary", "gates", "top_k", "weighting", "aggregation")),
            arxiv.group(1) if arxiv else "-",
        )
    console.print(table)
    if verbose:
        _render_details(console, data)


def _named(data: list[dict[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of these methods in the order of the names."""
    found = {row["name"]: row for row in data}
    for name in names:
        if name not in found:
            get_method(name)  # raises but for expert:<name>
    return [found.get(name, found[_FIXED]) for name in dict.fromkeys(names)]


def _render_details(console: Console, data: list[dict[str, Any]]) -> None:
    console.print(
        f"\n[bold]Taxonomy[/bold] ({SURVEY}; 3.n: its section, whose values these are; -: ours, in its words)"
    )
    console.print(", ".join(f"{short}: {value}" for value, short in SHORT.items()), highlight=False)
    table = _table("method", "3.n", *TAXONOMY_HEADERS.values())
    for row in data:
        values = (row["taxonomy"][name] for name in TAXONOMY_HEADERS)
        table.add_row(row["name"], row["survey"], *(SHORT.get(value, value) for value in values))
    console.print(table)
    console.print("\n[bold]Options with their defaults (own; of the routing), embedders and papers[/bold]")
    for row in data:
        console.print(f"[cyan]{row['name']}[/cyan]  {row['options']}; {row['routing']}", highlight=False)
        if row["embedder"] != "-":
            console.print(f"    embedder: {row['embedder']}", highlight=False)
        console.print(f"    {row['paper']}", highlight=False)
        if row["differs"] != "-":
            console.print(f"    differs: {row['differs']}", highlight=False)


def _table(*headers: str, wraps: str | None = None) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, show_edge=False, collapse_padding=True)
    for header in headers:
        table.add_column(header, no_wrap=header != wraps, style="cyan" if header == "method" else None)
    return table
