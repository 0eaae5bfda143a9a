"""A `TokenRouting` as one HTML file: the text coloured by its experts; pointing at a token shows them by layer."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path

from ..files.atomic import write_atomically
from .explain import Stream, TokenRouting
from .explain_text import bands, colours_of, painted, totals
from .palette import OTHERS, colour_of, cut, ink_on
from .token_texts import Piece, visible

_TOLD = 3  # experts of a layer
_PAGE = """<!doctype html>
<html><head><meta charset="utf-8"><title>moerge explain</title><style>
body{font-family:sans-serif;margin:1em} .text{font-family:monospace;white-space:pre-wrap;line-height:1.7;max-width:70em}
.text span{border-radius:3px}
.new{text-decoration:underline} .special{opacity:.6} .key{padding:2px 6px;margin-right:4px}
#tip{position:fixed;display:none;background:#fff;border:1px solid #888;padding:6px;font-size:12px;max-height:95vh;
overflow:hidden} #tip td{padding:0 6px;white-space:nowrap} h3{margin:1.2em 0 .3em}
</style></head><body>
"""
_SCRIPT = """<div id="tip"></div><script>
const data = DATA;
const tip = document.getElementById('tip');
function cell(row, text, colour) {
  const td = row.insertCell(); td.textContent = text;
  if (colour) { td.style.background = colour[0]; td.style.color = colour[1]; }
}
document.addEventListener('mouseover', event => {
  const at = event.target.dataset ? event.target.dataset.piece : undefined;
  if (at === undefined) { tip.style.display = 'none'; return; }
  const [stream, piece] = at.split(' ').map(Number), told = data.streams[stream];
  tip.replaceChildren(told.pieces[piece][0]);
  const table = document.createElement('table');
  told.depths.forEach((depth, i) => {
    const row = table.insertRow(); cell(row, depth);
    for (const [expert, weight] of told.pieces[piece][1][i])
      cell(row, data.experts[expert] + ' ' + weight.toFixed(3), data.colours[expert]);
  });
  tip.append(table); tip.style.display = 'block';
  const box = tip.getBoundingClientRect();
  tip.style.left = Math.max(0, Math.min(event.clientX + 16, innerWidth - box.width - 8)) + 'px';
  tip.style.top = Math.max(0, Math.min(event.clientY + 16, innerHeight - box.height - 8)) + 'px';
});
</script></body></html>
"""


def write_explanation(found: TokenRouting, path: Path, *, parts: int) -> int:
    """Write the page, with the text once for each of `parts` bands of layers; its size in bytes."""
    colours = colours_of(found)
    total = dict(zip(found.experts, totals(found).tolist(), strict=True))
    keys = [_key(name, colour, total[name]) for name, colour in colours.items()]
    if len(colours) < len(found.experts):
        rest = sum(share for name, share in total.items() if name not in colours)
        keys.append(_key(f"{len(found.experts) - len(colours)} others", OTHERS, rest))
    body = [_PAGE, f"<h2>{escape(found.method)}: which experts spoke</h2><p>{''.join(keys)}</p>\n"]
    body += [f"<p>{escape(note)}</p>\n" for note in found.notes]
    for number, stream in enumerate(found.streams):
        for name, depths in bands(stream, parts):
            head = f"{stream.name}, {name}" if len(found.streams) > 1 else name
            pairs = enumerate(zip(stream.pieces, painted(stream, found, depths, colours), strict=True))
            spans = [_span(stream, piece, f"{number} {at}", colour) for at, (piece, colour) in pairs]
            body.append(f'<h3>{escape(head)}</h3><div class="text">{"".join(spans)}</div>\n')
    data = {
        "experts": [cut(name) for name in found.experts],
        "colours": [(c := colour_of(name, colours), ink_on(c)) for name in found.experts],
        "streams": [_data(stream) for stream in found.streams],
    }
    body.append(_SCRIPT.replace("DATA", json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"), 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write_text("".join(body), encoding="utf-8"))
    return path.stat().st_size


def _key(name: str, colour: str, share: float) -> str:
    style = f"background:{colour};color:{ink_on(colour)}"
    return f'<span class="key" style="{style}">{escape(visible(name))} {share:.0%}</span> '


def _span(stream: Stream, piece: Piece, at: str, colour: str | None) -> str:
    kinds = ["new"] * (piece.start >= stream.prompt) + ["special"] * piece.special
    style = f' style="background:{colour};color:{ink_on(colour)}"' if colour else ""
    return f'<span data-piece="{at}" class="{" ".join(kinds)}"{style}>{escape(visible(piece.text))}</span>'


def _data(stream: Stream) -> dict:
    """Of each piece what it is, and at every depth [expert, weight] of the leading ones, the mean of its tokens."""
    pieces = []
    for piece in stream.pieces:
        mean = stream.weights[piece.start : piece.stop].mean(0)
        best = mean.abs().topk(min(_TOLD, mean.shape[1])).indices
        rows = [
            [[e, round(row[e].item(), 3)] for e in some if row[e]]
            for row, some in zip(mean, best.tolist(), strict=True)
        ]
        tokens = f"tokens {piece.start}-{piece.stop - 1}" if piece.stop - piece.start > 1 else f"token {piece.start}"
        names = " ".join(stream.tokens[piece.start : piece.stop])
        pieces.append([f"{tokens}: {visible(piece.text).strip()} ({visible(names)})", rows])
    return {"depths": [str(depth) for depth in stream.depths], "pieces": pieces}
