"""Markdown tables from result rows. A function of TABLES takes (rows, results folder) and returns the block's text."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from .quality.methods_page import methods, survey
from .quality.whole_way import page as whole_way
from .render_gpu import gpu
from .results import Row

NOTHING = "*Nothing recorded yet.*"
# equal work with other hands; peft_one does less (one adapter, no routing), the ours and plain rows are no rivals
PEERS = (
    "dense",
    "sort_loop",
    "grouped_mm",
    "gather_bmm",
    "torch_reference",
    "compiled_dense",
    "compiled_reference",
    "peft_arrow",
    "vllm_triton",
    "sglang_csgmv",
    "sglang_sgemm",
)
LAYER = ("dtype", "D", "O", "E", "K", "R", "popularity", "mode", "cache")


def _table(head: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    head = list(head)
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *lines))


def _machines(rows: list[Row]) -> list[tuple[str, list[Row]]]:
    """Rows by machine and thread count, with a line that says what was measured on what."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((row["machine"], row["threads"]), []).append(row)
    out = []
    for (machine, threads), mine in sorted(groups.items()):
        last = max(mine, key=lambda r: r["time"])
        commits = sorted({r["commit"] for r in mine})
        facts = f"**{machine}**, {threads} threads, {last['isa']}; torch {last['torch']}, PEFT {last['peft']}"
        out.append((f"{facts}; commit {', '.join(commits)}; {last['time'][:10]}.", mine))
    return out


def _suite(rows: list[Row], suite: str) -> list[Row]:
    return [row for row in rows if row.get("suite") == suite]


def _cells(rows: Iterable[Row]) -> dict[tuple, dict[str, Row]]:
    """{(layer..., T): {candidate: row}}"""
    cells: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        cells.setdefault((*(row.get(k) for k in LAYER), row.get("T")), {})[row["candidate"]] = row
    return dict(sorted(cells.items(), key=lambda item: tuple(str(v).rjust(6) for v in item[0])))


def _layer(key: tuple) -> str:
    dtype, d, o, e, k, r, popularity, mode, cache = key[: len(LAYER)]
    text = f"{dtype} {d} → {o}, E={e}, K={k}, R={r}"
    text += "" if popularity == "uniform" else f", {popularity}"
    text += {"apply": ", ids given", "routed": ""}.get(mode, "")
    return text + (", warm" if cache == "warm" else "")


def _ok(row: Row | None) -> bool:
    return row is not None and row["status"] == "ok"


def lost_to(cell: dict[str, Row]) -> list[str]:
    """Peers whose branch was faster than ours (PEFT's Arrow is compared with our Arrow)."""
    lost = []
    for label in PEERS:
        rival, own = cell.get(label), cell.get("ours_arrow" if label == "peft_arrow" else "ours")
        if _ok(rival) and _ok(own) and rival["branch"] < own["branch"]:
            lost.append(label)
    return lost


def _ratio(row: Row | None, mark: str = "") -> str:
    if row is None:
        return ""
    if not _ok(row):
        return row["status"]
    return f"{row['ratio']:.2f} [{row['ratio_p10']:.2f}–{row['ratio_p90']:.2f}]{mark}"


def summary(rows: list[Row], folder: Path) -> str:
    """Ours / plain for the routed layer, one line per layer, one column per T."""
    out = []
    for title, mine in _machines([r for r in _suite(rows, "linear") if r.get("mode") == "routed"]):
        cells = _cells(mine)
        tokens = sorted({key[-1] for key in cells})
        lines: dict[str, dict[int, str]] = {}
        for key, cell in cells.items():
            mark = " **lost**" if lost_to(cell) else ""
            lines.setdefault(_layer(key), {})[key[-1]] = _ratio(cell.get("ours"), mark)
        table = [[name, *(by_t.get(t, "") for t in tokens)] for name, by_t in lines.items()]
        out.append(title + "\n\n" + _table(["patched / plain", *(f"T={t}" for t in tokens)], table))
    note = "\n\nMedian [p10–p90] of interleaved rounds; **lost**: a peer's branch was faster in that cell."
    return "\n\n".join(out) + note if out else NOTHING


def linear(rows: list[Row], folder: Path) -> str:
    """Ours in every cell: ratio, microseconds of the branch, distance from the floor, noise."""
    out = []
    for title, mine in _machines(_suite(rows, "linear")):
        lines = []
        for key, cell in _cells(mine).items():
            ours, plain = cell.get("ours"), cell.get("plain")
            if _ok(ours) and _ok(plain):
                floor = f"{ours['floor_us']:.4g} ({ours['floor_bound']})"
                lines.append([_layer(key), str(key[-1]), f"{plain['us']:.0f}", _ratio(ours), f"{ours['branch']:.0f}"])
                lines[-1] += [floor, f"{ours['over_floor']:.1f}", f"±{ours['noise'] * 100:.1f} %"]
            else:
                why = next((r.get("note", "") for r in cell.values() if not _ok(r)), "")
                lines.append([_layer(key), str(key[-1]), "", f"not measured: {why}", "", "", "", ""])
        head = ["layer", "T", "plain µs", "ours / plain", "branch µs", "floor µs", "branch / floor", "A/A noise"]
        out.append(title + "\n\n" + _table(head, lines))
    return "\n\n".join(out) or NOTHING


def peers(rows: list[Row], folder: Path) -> str:
    """The branch of every peer as a multiple of ours."""
    out = []
    for title, mine in _machines(_suite(rows, "linear")):
        present = {row["candidate"] for row in mine if row["status"] != "skipped"}
        labels = [label for label in (*PEERS, "peft_one") if label in present]
        lines = []
        for key, cell in _cells(mine).items():
            if not _ok(cell.get("ours")):
                continue
            line = [_layer(key), str(key[-1]), f"{cell['ours']['branch']:.0f} µs"]
            lines.append(line + [_times(cell, label) for label in labels])
        if lines:
            out.append(title + "\n\n" + _table(["layer", "T", "ours", *labels], lines))
    return "\n\n".join(out) or NOTHING


def _times(cell: dict[str, Row], label: str) -> str:
    row = cell.get(label)
    own = cell.get("ours_arrow") if label == "peft_arrow" else cell.get("ours")
    if row is None or not _ok(own):
        return ""
    if not _ok(row):
        return row["status"]
    if own["branch"] <= 0:
        return f"{row['branch']:.0f} µs"
    text = f"{row['branch'] / own['branch']:.1f}×"
    return f"**{text} (faster)**" if label in lost_to(cell) else text


def losing(rows: list[Row], folder: Path) -> str:
    """The cells where a peer beats us, and everything that was wrong, failed or not run."""
    lost: list[list[str]] = []
    left: dict[tuple, list[tuple[str, str]]] = {}  # what was not timed and why, and where
    for title, mine in _machines(_suite(rows, "linear")):
        machine = title.partition(",")[0]
        for key, cell in _cells(mine).items():
            for label in lost_to(cell):
                own = cell["ours_arrow" if label == "peft_arrow" else "ours"]
                lost.append(
                    [machine, _layer(key), str(key[-1]), label, f"{cell[label]['branch']:.0f}", f"{own['branch']:.0f}"]
                )
            for row in cell.values():
                if not _ok(row):
                    why = (machine, row["candidate"], row["status"], row["note"])
                    left.setdefault(why, []).append((_layer(key), str(key[-1])))
    if not _suite(rows, "linear"):
        return NOTHING
    text = "No peer's branch is faster than ours in a recorded cell."
    if lost:
        text = _table(["machine", "layer", "T", "faster peer", "its branch µs", "ours µs"], lost)
    if left:
        head = ["machine", "layer", "T", "candidate", "status", "why"]
        lines = []
        for (machine, *why), cells in left.items():
            where = cells[0] if len(cells) == 1 else (f"{len(cells)} cells", "")
            lines.append([machine, *where, *why])
        text += "\n\nNot timed:\n\n" + _table(head, lines)
    return text


def ops(rows: list[Row], folder: Path) -> str:
    """The ops alone: microseconds of each candidate."""
    out = []
    for suite in ("route", "lora"):
        for title, mine in _machines(_suite(rows, suite)):
            labels = [n for n in dict.fromkeys(r["candidate"] for r in mine) if n not in ("plain_again", "all")]
            lines = []
            for key, cell in _cells(mine).items():
                times = [f"{cell[n]['us']:.0f}" if _ok(cell.get(n)) else "" for n in labels]
                best = min((c["us"] for n, c in cell.items() if _ok(c) and not n.startswith("plain")), default=None)
                won = "" if not _ok(cell.get("ours")) or cell["ours"]["us"] <= best else " **lost**"
                lines.append([_layer(key).removesuffix(", ids given") + won, str(key[-1]), *times])
            out.append(f"`{suite}`, µs. {title}\n\n" + _table(["layer", "T", *labels], lines))
    return "\n\n".join(out) or NOTHING


def model(rows: list[Row], folder: Path) -> str:
    """Prefill, token, dispatch and memory of the random Llama."""
    out = []
    for title, mine in _machines(_suite(rows, "model")):
        lines = []
        for row in sorted(mine, key=lambda r: (str(r.get("size")), str(r.get("dtype")))):
            if (
                row["status"] == "ok"
                and row.get("phase") in ("prefill", "decode")
                and row["candidate"] != "plain_again"
            ):
                named = "SmolLM2-" if row["size"] == "real" else ""
                what = f"{named}{row['parameters'] / 1e6:.0f}M {row['dtype']}, E={row['E']}, {row['phase']}"
                what += f" (T={row['T']})" if row["phase"] == "prefill" else " (one token)"
                lines.append(
                    [what, row["candidate"], f"{row['us'] / 1e3:.2f}", _ratio(row), f"{row['branch_per_module']:.0f}"]
                )
        text = title + "\n\n" + _table(["model", "candidate", "ms", "/ plain", "branch µs per module"], lines)
        memory = [r for r in mine if r.get("phase") == "memory" and r["status"] == "ok"]
        if memory:
            table = [
                [
                    f"{r['parameters'] / 1e6:.0f}M {r['dtype']}",
                    r["candidate"],
                    f"{r['built_mib']:.0f}",
                    f"{r['peak_mib']:.0f}",
                ]
                for r in sorted(memory, key=lambda r: (str(r["size"]), r["dtype"]))
            ]
            text += "\n\n" + _table(["model", "candidate", "MiB when built", "peak MiB while running"], table)
        for row in mine:
            if row["status"] != "ok":
                text += f"\n\nNot measured: {row.get('dtype', '')} {row['mode']} {row['candidate']}: {row['note']}"
            elif row.get("phase") == "dispatch" and row["candidate"] == "ours":
                text += f"\n\nPython and dispatch per patched module (D = O = 8, T = 1): {row['branch']:.1f} µs."
        out.append(text)
    return "\n\n".join(out) or NOTHING


_LOADING = {
    "load_file": "`safetensors.torch.load_file`",
    "load_experts": "`load_experts`",
    "patch": "`patch` (memory: with `load_experts`)",
    "peft": "PEFT `load_adapter`",
}


def loading(rows: list[Row], folder: Path) -> str:
    """Reading adapters, patching with them, and the memory of it."""
    out = []
    for title, mine in _machines(_suite(rows, "loading")):
        lines = []
        for row in mine:
            if row["status"] != "ok":
                lines.append([row["candidate"], f"not measured: {row['note']}", "", "", "", ""])
                continue
            count, seconds, peak = int(row.get("adapters", row["E"])), row["seconds"], row.get("peak_mib")
            line = [_LOADING[row["candidate"]], str(count), f"{seconds:.2f}", f"{1e3 * seconds / count:.1f}"]
            line += ["", ""] if peak is None else [f"{row['bank_mib']:.0f}", f"{peak / row['bank_mib']:.2f}"]
            lines.append(line)
        what = f"Rank {mine[0]['R']}, {mine[0]['modules']} modules, {mine[0]['dtype']}, page cache warm."
        head = ["", "adapters", "s", "ms per adapter", "MiB of factors", "peak beyond the base / factors"]
        out.append(f"{title}\n\n{what}\n\n{_table(head, lines)}")
    return "\n\n".join(out) or NOTHING


_SERVED = {
    "plain": "plain vLLM",
    "plain_again": "plain vLLM again (noise)",
    "ours": "with routed experts",
    "ours_bfloat16": "with routed experts in bfloat16",
    "vllm_lora": "vLLM's own LoRA, one adapter a request",
    "generate": "`generate` of the patched model, one by one",
}


def serve(rows: list[Row], folder: Path) -> str:
    """Requests at once to vLLM: throughput, and the time to the first and to each further token."""
    out = []
    for title, mine in _machines(_suite(rows, "serve")):
        lines = []
        for row in sorted(mine, key=lambda r: int(r["mode"].split()[0].removeprefix("C="))):
            count, way = row["mode"].split()
            line = [f"{count.removeprefix('C=')} ({way})", _SERVED[row["candidate"]], f"{row['tokens_per_second']:.1f}"]
            cpu = f"{row['cpu_ms_per_token']:.1f}" if "cpu_ms_per_token" in row else ""
            line += [_spread(row, "seconds"), cpu, _spread(row, "cpu")]
            line += [f"{row[f'{key}_ms']:.0f}" if f"{key}_ms" in row else "" for key in ("first", "each")]
            lines.append([*line, _spread(row, "first"), _spread(row, "each"), str(row.get("load", "not noted"))])
        head = ["at once", "", "tokens/s", "time / plain", "CPU ms per token", "CPU / plain"]
        head += ["ms to the first token", "ms per token", "first / plain", "per token / plain", "load"]
        about = f"{mine[0]['size']}, E={mine[0]['E']}, R={mine[0]['R']}, {mine[0]['dtype']}. Medians of "
        about += f"{mine[0]['rounds']} rounds [smallest–largest]; load: of the machine, when a row was begun."
        out.append(f"{title}\n\n{about}\n\n{_table(head, lines)}")
    return "\n\n".join(out) or NOTHING


def _spread(row: Row, key: str) -> str:
    """The ratio of a serve row to plain, with its range."""
    if f"{key}_ratio" not in row:
        return ""
    low, high = row[f"{key}_ratio_range"]
    return f"{row[f'{key}_ratio']:.2f} [{low:.2f}–{high:.2f}]"


def plots(rows: list[Row], folder: Path) -> str:
    """The images that lie in the results folder."""
    found = sorted(folder.glob("*-t*-*-cold.png")) + sorted(folder.glob("*-t*-*-warm.png"))
    return "\n\n".join(f"![{path.stem}]({folder.name}/{path.name})" for path in found) or NOTHING


def demo(rows: list[Row], folder: Path) -> str:
    """What `moerge demo --json bench/results/demo.json` measured; rows are not used."""
    file = folder / "demo.json"
    if not file.exists():
        return NOTHING
    found = json.loads(file.read_text())
    columns = list(found["held_in"])
    lines = []
    for part, heading in (("held_in", "held-in skills"), ("held_out", "held-out compositions")):
        lines.append(
            (f"**{heading}**: mean of {len(found[part][columns[0]])}", *_percent(found["means"][part], columns))
        )
        for name in found[part][columns[0]]:
            lines.append((f"&nbsp;&nbsp;{name}", *_percent({c: found[part][c][name] for c in columns}, columns)))
    routed, oracle = (found["means"]["held_in"][c] for c in ("PHATGOOSE", "best expert"))
    speed, versions = found["tokens_per_second"], found["versions"]
    text = (
        f"Exact match in %, {found['samples']} prompts per row, {len(found['experts'])} experts. "
        f"PHATGOOSE keeps {routed / oracle:.0%} of the best expert per task; {speed['plain']:,.0f} tokens/s plain, "
        f"{speed['patched']:,.0f} patched ({found['threads']} CPU threads, torch {versions['torch']})."
    )
    return _table(("", *columns), lines) + "\n\n" + text


def demo_real(rows: list[Row], folder: Path) -> str:
    """What `moerge demo --model smollm2 --json bench/results/demo_real.json` measured, scored from its answers."""
    file = folder / "demo_real.json"
    if not file.exists():
        return NOTHING
    from moerge_ext.demo import real
    from moerge_ext.evaluation.report import cells

    found = json.loads(file.read_text())
    items = found["items"]
    questions = [real.Question(item["skill"], item["question"], item["right"]) for item in items]
    results = real.Results(questions, {column: [item[column] for item in items] for column in real.COLUMNS}, [])
    head, *lines = zip(*cells(results.scores()), strict=True)
    shown = {item["skill"]: item for item in reversed(items)}  # the first of each
    text = (
        f"% right, 95 % intervals, {len(items)} questions; above, the first of each kind with PHATGOOSE's answer. "
        f"{'; '.join(real.compared(results))}. The whole demo took {found['cpu_seconds']:.0f} s of CPU time "
        f"(threads: {found['threads']}, torch {found['versions']['torch']})."
    )
    said = "\n".join(_answered(shown[skill]) for skill in dict.fromkeys(question.skill for question in questions))
    return f"```text\n{said}\n```\n\n{_table(head, lines)}\n\n{text}"


def _answered(item: dict[str, str]) -> str:
    from moerge_ext.demo.real import plain

    answer = " ".join(item["phatgoose"].split())
    right = plain(answer) == plain(item["right"])
    return f"> {item['question']}\n{answer}" + ("" if right else f"    (should be {item['right']})")


def _percent(values: dict[str, float], columns: list[str]) -> list[str]:
    return [f"{100 * values[c]:.0f}" for c in columns]


TABLES: dict[str, Callable[[list[Row], Path], str]] = {
    "summary": summary,
    "linear": linear,
    "peers": peers,
    "losing": losing,
    "ops": ops,
    "model": model,
    "loading": loading,
    "serve": serve,
    "gpu": gpu,
    "plots": plots,
    "demo": demo,
    "demo-real": demo_real,
    "whole-way": whole_way,
    "methods": methods,
    "survey": survey,
}
