"""A `TokenRouting` for the terminal and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor

from .explain import Stream, TokenRouting
from .palette import OTHERS, colour_of, coloured, cut, ink_on
from .token_texts import visible

LEAST = 0.005  # of the weight: experts with less are not listed


def colours_of(found: TokenRouting) -> dict[str, str]:
    """{expert: colour}, by their share of everything."""
    return coloured(found.experts, totals(found))


def totals(found: TokenRouting) -> Tensor:
    """[E] float32: each expert's share of the weight on all tokens that were read."""
    return torch.cat([stream.shares()[stream.read] for stream in found.streams]).mean(0)


def bands(stream: Stream, count: int) -> list[tuple[str, slice]]:
    """(name, depths) of about `count` neighbouring parts of each stack of layers, and of each module outside."""
    made, depths = [], stream.depths
    start = 0
    while start < len(depths):
        stop = start + 1
        while stop < len(depths) and depths[start].layer is not None and depths[stop].stack == depths[start].stack:
            stop += 1
        parts = min(count, stop - start)
        edges = [start + round(i * (stop - start) / parts) for i in range(parts + 1)]
        made += [(_band_name(stream, a, b), slice(a, b)) for a, b in zip(edges, edges[1:], strict=False)]
        start = stop
    return made


def _band_name(stream: Stream, start: int, stop: int) -> str:
    first = stream.depths[start]
    if first.layer is None:
        return str(first)
    runs: list[list[int]] = []
    for depth in stream.depths[start:stop]:
        if runs and depth.layer == runs[-1][-1] + 1:
            runs[-1].append(depth.layer)
        else:
            runs.append([depth.layer])
    numbers = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"{first.stack + ' ' if first.stack else ''}layer{'s' if stop - start > 1 else ''} {numbers}"


def legend(found: TokenRouting, colours: Mapping[str, str]) -> Text:
    """The experts in their colours, with their share of all weight."""
    made, total = Text(), dict(zip(found.experts, totals(found).tolist(), strict=True))
    for name, colour in colours.items():
        if total[name] >= LEAST or len(found.experts) <= 4:
            made.append(f" {visible(cut(name))} ", style=_style(colour)).append(f" {total[name]:.0%}   ")
    rest = sum(share for name, share in total.items() if name not in colours)
    if len(colours) < len(found.experts):
        made.append(f" {len(found.experts) - len(colours)} others ", style=_style(OTHERS)).append(f" {rest:.0%}")
    return made


def as_text(found: TokenRouting, *, parts: int, table: bool) -> Group:
    """The text once for each of `parts` bands of layers, every piece in the colour of the expert that leads there.

    table: each token besides, with the experts of every band and their weights.
    """
    colours = colours_of(found)
    lines: list[Any] = [legend(found, colours)]
    for stream in found.streams:
        for name, depths in bands(stream, parts):
            head = f"\n{stream.name}, {name}:" if len(found.streams) > 1 else f"\n{name}:"
            lines += [Text(head, style="bold"), _coloured(stream, found, depths, colours)]
        if table:
            lines.append(_table(stream, found, parts, colours))
    lines += [Text(f"\n{note}") for note in found.notes]
    return Group(*lines)


def painted(stream: Stream, found: TokenRouting, depths: slice, colours: Mapping[str, str]) -> list[str | None]:
    """The colour of every piece, of the expert that leads at these depths; None for one that was not read."""
    shares, read = stream.shares(depths), stream.read
    made: list[str | None] = []
    for piece in stream.pieces:
        tokens = slice(piece.start, piece.stop)
        leading = found.experts[int(shares[tokens].mean(0).argmax())]
        made.append(colour_of(leading, colours) if read[tokens].any() else None)
    return made


def _coloured(stream: Stream, found: TokenRouting, depths: slice, colours: Mapping[str, str]) -> Text:
    made = Text()
    for piece, colour in zip(stream.pieces, painted(stream, found, depths, colours), strict=True):
        generated = " underline" if piece.start >= stream.prompt else ""
        made.append(visible(piece.text), style=((_style(colour) if colour else "") + generated).strip())
    return made


def _table(stream: Stream, found: TokenRouting, parts: int, colours: Mapping[str, str]) -> Table:
    split = bands(stream, parts)
    table = Table("", "token", *(name for name, _ in split), title=f"\n{stream.name}", title_justify="left")
    shares = [stream.shares(depths) for _, depths in split]
    for piece in stream.pieces:
        for token in range(piece.start, piece.stop):
            text = visible(piece.text).replace("\n", "")
            if piece.stop - piece.start > 1:
                text += f" {token - piece.start + 1}/{piece.stop - piece.start}"
            cells = [_leading(share[token], found, colours) for share in shares]
            generated = " +" if token >= stream.prompt else ""
            table.add_row(f"{token}{generated}", Text(text, style="dim" if piece.special else ""), *cells)
    return table


def _leading(shares: Tensor, found: TokenRouting, colours: Mapping[str, str]) -> Text:
    made = Text()
    best = shares.topk(min(2, len(found.experts)))
    for share, e in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        if share >= LEAST:
            made.append(visible(cut(found.experts[e])), style=_style(colour_of(found.experts[e], colours)))
            made.append(f" {share:.0%}  ")
    return made


def _style(colour: str) -> str:
    return f"{ink_on(colour)} on {colour}"


def as_json(found: TokenRouting) -> dict[str, Any]:
    """Everything, as JSON takes it: of every token and depth the experts whose weight is not 0."""
    return {
        "method": found.method,
        "experts": list(found.experts),
        "notes": found.notes,
        "streams": [
            {
                "name": stream.name,
                "prompt_tokens": stream.prompt,
                "depths": [str(depth) for depth in stream.depths],
                "pieces": [
                    {"text": piece.text, "start": piece.start, "stop": piece.stop, "special": piece.special}
                    for piece in stream.pieces
                ],
                "tokens": [_token(stream, found, token) for token in range(len(stream.ids))],
            }
            for stream in found.streams
        ],
    }


def _token(stream: Stream, found: TokenRouting, token: int) -> dict[str, Any]:
    weights = {}
    for depth, row in zip(stream.depths, stream.weights[token], strict=True):
        chosen = row.nonzero().flatten().tolist()
        weights[str(depth)] = {found.experts[e]: round(row[e].item(), 6) for e in chosen}
    return {
        "id": stream.ids[token],
        "token": stream.tokens[token],
        "generated": token >= stream.prompt,
        "weights": weights,
    }
