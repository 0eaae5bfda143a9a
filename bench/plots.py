"""Draws the ratio to the plain layer against T, one image per layer and machine, into bench/results/."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script only its own folder is on the path

from bench.results import FOLDER, Row, latest, read_all

PLOTTED = ("mode", "dtype", "D", "O", "E", "K", "R", "popularity", "cache", "machine", "threads")


def groups(rows: list[Row]) -> dict[tuple, dict[str, list[Row]]]:
    """{layer: {candidate: rows by T}} for the linear suite, layers with at least two T."""
    found: dict[tuple, dict[str, list[Row]]] = {}
    for row in rows:
        if row.get("suite") == "linear" and row["status"] == "ok" and row["candidate"] != "plain":
            layer = found.setdefault(tuple(row[name] for name in PLOTTED), {})
            layer.setdefault(row["candidate"], []).append(row)
    for layer in found.values():
        for line in layer.values():
            line.sort(key=lambda r: r["T"])
    return {key: layer for key, layer in found.items() if len({r["T"] for line in layer.values() for r in line}) > 1}


def draw(key: tuple, layer: dict[str, list[Row]], folder: Path) -> Path:
    """One image; the band is p10 to p90."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    mode, dtype, d, o, e, k, r, popularity, cache, machine, threads = key
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for label, rows in sorted(layer.items(), key=lambda item: (not item[0].startswith("ours"), item[0])):
        style = {"linewidth": 2.5, "zorder": 3} if label.startswith("ours") else {"linewidth": 1.2}
        if label == "plain_again":
            style = {"color": "grey", "linestyle": ":"}
        tokens = [row["T"] for row in rows]
        (line,) = axes.plot(tokens, [row["ratio"] for row in rows], marker="o", markersize=4, label=label, **style)
        low, high = ([row[name] for row in rows] for name in ("ratio_p10", "ratio_p90"))
        axes.fill_between(tokens, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="tokens T", ylabel="time / plain layer")
    ticks = sorted({row["T"] for rows in layer.values() for row in rows})
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()
    axes.set_title(
        f"{mode} {dtype} {d}→{o}, E={e} K={k} R={r}, {popularity}, {cache}\n{machine}, {threads} threads", fontsize=9
    )
    axes.legend(fontsize=7, ncols=2)
    path = folder / f"{machine}-t{threads}-{mode}-{dtype}-{d}x{o}-e{e}k{k}r{r}-{popularity}-{cache}.png"
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench/plots.py", description=__doc__)
    parser.add_argument("--results", type=Path, default=FOLDER)
    parser.add_argument("--all", action="store_true", help="every layer, not only uniform popularity with routing")
    args = parser.parse_args(argv)
    for key, layer in groups(latest(read_all(args.results))).items():
        facts = dict(zip(PLOTTED, key, strict=True))
        if args.all or (facts["mode"], facts["popularity"]) == ("routed", "uniform"):
            print(draw(key, layer, args.results).name)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
