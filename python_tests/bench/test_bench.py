"""The benchmark runs end to end, catches a wrong candidate, resumes, and its tables are stable."""

import io
import json
import math
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bench_checkout import REPO  # first: bench is importable after it

from bench import (
    cells,
    compiled,
    data,
    linear,
    machine,
    peers,
    plots,
    render,
    results,
    run,
    serve,
    table,
    timing,
    triton_peers,
)

CPU = torch.device("cpu")
CELL = cells.Cell(64, 48, 5, 2, 4, 9)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """Results of the tiny linear suite."""
    folder = tmp_path_factory.mktemp("results")
    assert run.main(["linear", "--tiny", "--threads", "1", "--results", str(folder)]) == 0
    return folder


def rows_of(folder: Path) -> list[dict]:
    return results.read_all(folder)


def test_every_candidate_has_a_full_row(tiny):
    rows = rows_of(tiny)
    left = {row["candidate"] for row in rows if row["status"] != "ok"}
    assert left == set(triton_peers.ENGINES) and {row["status"] for row in rows} == {"ok", "skipped"}
    rows = [row for row in rows if row["status"] == "ok"]
    routed = {row["candidate"] for row in rows if row["mode"] == "routed"}
    assert routed >= {"plain", "plain_again", "ours", "peft_arrow", "ours_arrow", "peft_one", *list(render.PEERS[:5])}
    needed = "machine threads isa commit build torch moerge peft cache time us us_p10 us_p90 ratio ratio_p10 ratio_p90"
    needed += " branch floor_us floor_bound noise experts_used bandwidth rate rounds"
    for row in rows:
        assert set(needed.split()) <= set(row), row
        assert row["us_p10"] <= row["us"] <= row["us_p90"]
        assert row["candidate"] in ("plain", "plain_again") or row["over_floor"] is not None


def test_no_row_names_a_host_or_path(tiny):
    import socket

    text = "".join(path.read_text() for path in tiny.iterdir())
    assert str(REPO) not in text and f'"{socket.gethostname()}"' not in text


@pytest.mark.parametrize("suite", ["route", "lora"])
def test_op_suites_run(suite, tmp_path):
    assert run.main([suite, "--tiny", "--threads", "1", "--results", str(tmp_path), "--filter", "T=3"]) == 0
    assert {row["suite"] for row in rows_of(tmp_path)} == {suite}
    assert f"`{suite}`" in render.ops(rows_of(tmp_path), tmp_path)


def test_resumes(tiny, capsys):
    before = rows_of(tiny)
    assert run.main(["linear", "--tiny", "--threads", "1", "--results", str(tiny)]) == 0
    assert capsys.readouterr().out.count("recorded already") == len(cells.tiny_cells())
    assert rows_of(tiny) == before


def test_other_settings_and_torn_lines_are_measured_again(tiny):
    path = next(tiny.glob("*.jsonl"))
    first = json.loads(path.read_text().splitlines()[0])
    environment = {name: first[name] for name in results.STATE if name != "settings"}
    cell = {"suite": "linear"} | cells.tiny_cells()[0].describe()
    assert results.Recorder(tiny, environment, run.TINY).has(cell)
    assert not results.Recorder(tiny, environment, replace(run.TINY, cold=False)).has(cell)
    assert not results.Recorder(tiny, environment | {"commit": "other"}, run.TINY).has(cell)
    with path.open("a") as file:
        file.write('{"suite": "lin')
    assert len(list(results.read(path))) == len(path.read_text().splitlines()) - 1
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines()[:-1]))


def test_a_wrong_result_of_ours_is_caught(tmp_path, monkeypatch, capsys):
    def wrong(self, base, x, i, w, experts):
        return base.add_(1e-2)

    monkeypatch.setattr(peers.Peers, "ours", wrong)
    arguments = ["linear", "--tiny", "--threads", "1", "--results", str(tmp_path), "--filter", "mode=apply"]
    assert run.main(arguments) == 1
    assert "relative error" in capsys.readouterr().err
    (row,) = [row for row in rows_of(tmp_path) if row["candidate"] == "ours"]
    assert row["status"] == "wrong" and "us" not in row


def test_serve_without_vllm_says_how_to_have_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None)
    assert run.main(["serve", "--results", str(tmp_path)]) == 2
    assert "serve needs vllm" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_caps_name_what_they_skip():
    weights = data.Weights(CELL, CPU, run.TINY)
    tokens = data.Tokens(CELL, weights)
    ability = {"bandwidth": 10.0, "float32": 10.0}
    late = timing.Candidate("late", lambda i: tokens.plain, traffic=1e12)
    large = timing.Candidate("large", lambda i: tokens.plain, transient=1e12)
    broken = timing.Candidate("broken", lambda i: torch.ones(2) @ torch.ones(3))
    good, rows = linear.admit([late, large, broken], CELL, tokens, ability, run.TINY)
    assert good == [] and [row["status"] for row in rows] == ["skipped", "skipped", "failed"]
    assert "100.0 s" in rows[0]["note"] and "GiB" in rows[1]["note"]


def test_a_peer_whose_compiled_code_fails_is_a_row(monkeypatch):
    def broken(*parts):
        raise SystemError("kernel returned a result with an exception set")

    monkeypatch.setattr(compiled, "_dense", lambda *_: broken)
    cell = replace(CELL, also=("compiled_dense",))
    tokens = data.Tokens(cell, weights := data.Weights(cell, CPU, run.TINY))
    found = compiled.candidates(cell, weights, tokens)
    good, (row,) = linear.admit(found, cell, tokens, {"bandwidth": 10.0, "float32": 10.0}, run.TINY)
    assert good == [] and row["status"] == "failed" and row["note"].startswith("SystemError: kernel")


def test_popularity():
    make = torch.Generator().manual_seed(0)
    for kind in cells.POPULARITY:
        ids = data.popularity(kind, 4000, 8, 2, make)
        assert ids.shape == (4000, 2) and (ids[:, 0] != ids[:, 1]).all() and ids.min() >= 0 and ids.max() < 8
    assert (data.popularity("all-same", 5, 8, 3, make) == torch.arange(3)).all()
    uniform = data.popularity("uniform", 40000, 8, 1, make).flatten().bincount(minlength=8) / 40000
    assert torch.allclose(uniform, torch.full((8,), 1 / 8), atol=0.01)
    zipf = data.popularity("zipf", 40000, 8, 1, make).flatten().bincount(minlength=8) / 40000
    want = 1 / torch.arange(1, 9)
    assert torch.allclose(zipf, want / want.sum(), atol=0.01)
    with pytest.raises(ValueError, match="popularity"):
        data.popularity("other", 1, 2, 1, make)


@pytest.mark.parametrize("kind", cells.POPULARITY)
def test_tokens_are_routed_where_the_popularity_says(kind):
    cell = replace(CELL, D=512, E=12, T=40, popularity=kind)
    tokens = data.Tokens(cell, data.Weights(cell, CPU, run.TINY))
    want = data.popularity(kind, cell.T, cell.E, cell.K, torch.Generator().manual_seed(2))
    assert torch.equal(tokens.experts64.sort(dim=1).values, want.sort(dim=1).values)


def test_copies_exceed_the_cache():
    cell = cells.Cell(2048, 2048, 8, 2, 16, 1)
    copies = data.copies_needed(cell, CPU, timing.Settings())
    assert copies == 64 or copies * 4 * 2048**2 >= 2 * machine.last_level_cache(CPU)
    assert data.copies_needed(cell, CPU, timing.Settings(cold=False)) == 1


def test_interleaving_pairs_rounds():
    order = []
    found = [timing.Candidate(n, lambda i, n=n: order.append((n, i))) for n in ("plain", "plain_again", "ours")]
    settings = timing.Settings(rounds=4, min_sample=0.0)
    times = timing.interleave(found, timing.Clock(CPU), settings, copies=3)
    assert {len(t) for t in times.values()} == {4}
    assert [n for n, _ in order[6:]] == ["plain", "plain_again", "ours"] * 4
    assert [i for _, i in order[6:9]] == [0, 1, 2]  # each takes the copy that was left alone longest
    stats = timing.summarize([2.0, None, 6.0], [1.0, 1.0, 2.0])
    assert (stats["rounds"], stats["ratio"], stats["branch"]) == (2, 2.5, 2.5e6)


def test_default_and_full_subsets():
    default, full = cells.default_cells(), cells.full_cells()
    assert len(set(default)) == len(default) and len(full) == len(set(full)) == 2 * 4 * 3 * 3 * 3 * 6 * 3 * 2
    for dtype in ("float32", "bfloat16"):
        for width in (2048, 4096):
            for experts in (36, 166):
                for tokens in (1, 16, 256, 1024):
                    assert cells.Cell(width, width, experts, 2, 16, tokens, dtype) in default
    keys = [cell.weights_key for cell in default]
    assert len(set(keys)) == sum(1 for a, b in zip([None, *keys], keys, strict=False) if a != b)


def test_slug():
    assert machine.slug("Intel(R) Xeon(R) Processor @ 2.50GHz") == "xeon-2.5ghz"
    assert machine.slug("AMD EPYC 7763 64-Core Processor") == "epyc-7763"
    assert machine.slug("NVIDIA H100 80GB HBM3") == "h100-80gb-hbm3"


def test_tables_and_plots(tiny, tmp_path):
    readme = tmp_path / "README.md"
    blocks = "".join(f"<!-- bench:{name} -->\n<!-- /bench -->\n\nbetween\n\n" for name in render.TABLES)
    readme.write_text("# Title\n\n" + blocks)
    arguments = ["--results", str(tiny), str(readme)]
    assert table.main(["--check", *arguments]) == 1
    assert table.main(arguments) == 0
    once = readme.read_text()
    assert "float32 64 → 48, E=5, K=2, R=4" in once and once.count("between") == len(render.TABLES)
    assert table.main(["--check", *arguments]) == 0
    assert table.main(arguments) == 0 and readme.read_text() == once
    layers = plots.groups([row | {"T": t} for t in (1, 16) for row in rows_of(tiny)])
    path = plots.draw(*next(iter(layers.items())), tmp_path)
    assert path.stat().st_size > 1000 and path.name in render.plots([], tmp_path)


def test_a_losing_cell_is_shown(tiny):
    rows = results.latest(rows_of(tiny))
    for row in rows:
        row["branch"] = {"ours": 20.0, "dense": 10.0}.get(row["candidate"], 1000.0)
    assert "| dense | 10 | 20 |" in render.losing(rows, tiny)
    assert "**lost**" in render.summary(rows, tiny) and "(faster)" in render.peers(rows, tiny)
    for row in rows:
        row["branch"] = 1.0
    assert "No peer" in render.losing(rows, tiny)


def test_bad_markers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown tables nothing"):
        table.fill("<!-- bench:nothing -->\n<!-- /bench -->", [], tmp_path)
    with pytest.raises(ValueError, match="markers"):
        table.fill("<!-- bench:linear -->\n", [], tmp_path)
    assert table.fill("no markers", [], tmp_path) == "no markers"


@pytest.mark.slow
def test_model_suite_runs(tmp_path):
    assert run.main(["model", "--tiny", "--threads", "1", "--results", str(tmp_path)]) == 0
    rows = rows_of(tmp_path)
    assert {row["phase"] for row in rows} == {"dispatch", "prefill", "decode", "memory"}
    assert [row["note"] for row in rows if row["status"] != "ok"] == []
    assert "peak MiB" in render.model(rows, tmp_path)


def test_rows_need_no_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert machine.commit.__wrapped__() == "unknown"


def test_every_phase_of_the_model_keeps_its_row():
    from bench.results import latest

    row = {"machine": "m", "threads": 2, "suite": "model", "candidate": "ours", "T": 512}
    old, *phases = ({**row, "phase": phase, "us": us} for phase, us in (("prefill", 1), ("prefill", 2), ("decode", 3)))
    assert latest([old, *phases]) == phases


def test_rows_of_an_older_commit_give_way():
    cell = {"machine": "m", "threads": 2, "suite": "linear", "T": 1}
    old = [cell | {"candidate": name, "commit": "a"} for name in ("ours", "peft_arrow")]
    new = [cell | {"candidate": "ours", "commit": "b"}]
    other = [cell | {"T": 16, "candidate": "ours", "commit": "a"}]
    assert results.latest([*old, *other, *new]) == [*other, *new]


def test_a_disturbed_cell_is_measured_again():
    noises = [0.5, 0.3, 0.4]
    skipped = {"status": "skipped"}
    runs = iter([skipped, {"noise": noise}] for noise in noises)
    assert linear.undisturbed(lambda: next(runs)) == [skipped, {"noise": 0.3}] and next(runs, None) is None
    runs = iter([[{"noise": 0.1}]])
    assert linear.undisturbed(lambda: next(runs)) == [{"noise": 0.1}]


def test_the_tables_are_those_of_the_committed_results(tmp_path):
    """Of the commit, not of the folder: whoever runs the benchmark has results of their own there.

    Beside the machines' files lie those of bench/quality, which are none of theirs."""
    files = [str(path.relative_to(REPO)) for path in table.FILES]
    asked = ["git", "-C", str(REPO), "archive", "--format=tar", "HEAD", "bench/results", *files]
    done = subprocess.run(asked, capture_output=True)
    if done.returncode:
        pytest.skip(f"no commit to look at: {done.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as committed:
        committed.extractall(tmp_path, filter="data")
    folder = tmp_path / "bench" / "results"
    assert (folder / "quality.jsonl").exists()
    assert table.main(["--check", "--results", str(folder), *(str(tmp_path / name) for name in files)]) == 0


def test_the_real_demo_is_scored_from_its_answers(tmp_path):
    """The table of the top README is that of the kept answers, and follows them."""
    kept = json.loads((results.FOLDER / "demo_real.json").read_text())
    assert f"-->\n{render.demo_real([], results.FOLDER)}\n\n<!--" in (REPO / "README.md").read_text()
    for item in kept["items"]:
        item["base"] = item["right"]
    (tmp_path / "demo_real.json").write_text(json.dumps(kept))
    text = render.demo_real([], tmp_path)
    assert "| mean (n=72) | 100.0 (" in text and "phatgoose minus base: -" in text


@pytest.mark.slow
def test_loading_suite_runs(tmp_path):
    assert run.main(["loading", "--tiny", "--threads", "1", "--results", str(tmp_path)]) == 0
    rows = {row["candidate"]: row for row in rows_of(tmp_path)}
    assert [row for row in rows.values() if row["status"] != "ok"] == []
    assert rows.keys() == set(render._LOADING) and rows["patch"]["bank_mib"] > 0
    text = render.loading(list(rows.values()), tmp_path)
    assert all(name in text for name in render._LOADING.values())


@pytest.mark.parametrize("share, wrong", [(0.0, 0.0), (1.0, 0.0), (0.5, 0.5)])
def test_an_answer_at_a_near_tie_is_compared_with_beginnings_too(share, wrong):
    """Of a model that is surer of short texts: what it says of either length is right, what lies between is not."""
    sure = {True: torch.tensor([0.0, 2.0]).log_softmax(-1), False: torch.tensor([0.0, 1.0]).log_softmax(-1)}
    candidate = object.__new__(serve.Generate)
    candidate.model = lambda ids: SimpleNamespace(logits=sure[ids.shape[1] <= 4].expand(1, ids.shape[1], 2))
    short, long = sure[True][1].item(), sure[False][1].item()
    said = [long + share * (short - long)] * 2 + [long]  # of two tokens after two, and of one that makes the text long
    answer = SimpleNamespace(token_ids=[1, 1, 1], logprobs=[{1: SimpleNamespace(logprob=value)} for value in said])
    assert candidate.worst([[0, 0]], [answer]) == pytest.approx(wrong * (short - long), abs=1e-6)
    answer.token_ids = [1, 0, 1]
    answer.logprobs[1] = {0: SimpleNamespace(logprob=0.0)}
    assert candidate.worst([[0, 0]], [answer]) == math.inf, "no best token"


def test_serve_rows_are_medians_of_ratios_round_by_round(tmp_path):
    def runs(*seconds):
        return [{"seconds": s, "cpu": s / 2, "first": s / 4, "each": s / 8} for s in seconds]

    found = {"plain": runs(1.0, 2.0, 4.0), "ours": runs(1.1, 2.6, 4.8)}
    found["generate"] = [{"seconds": 8.0, "cpu": 8.0, "requests": 4}]
    rows = {row["candidate"]: row for row in serve.rows_of(found, 8)}
    assert rows["ours"]["seconds_ratio"] == rows["ours"]["cpu_ratio"] == 1.2
    assert rows["ours"]["each_ratio_range"] == [1.1, 1.3]
    assert rows["plain"]["tokens_per_second"] == 8 * serve.ANSWER / 2.0
    assert rows["generate"]["tokens_per_second"] == 4 * serve.ANSWER / 8.0
    assert rows["generate"]["cpu_ms_per_token"] == 1e3 * 8.0 / (4 * serve.ANSWER)
    facts = dict(suite="serve", mode="C=8 compiled", size="small", E=8, R=16, dtype="float32", load=1.5)
    facts |= dict(machine="m", threads=1, isa="avx2", torch="2", peft="0", commit="c", time="2026-01-01T00")
    text = render.serve([row | facts for row in rows.values()], tmp_path)
    assert (
        "| 8 (compiled) | with routed experts | 98.5 | 1.20 [1.10–1.30] | 5.1 | 1.20 [1.10–1.30] | 650 | 325 |" in text
    )


def test_what_a_machine_is_held_to_has_a_file_of_its_own(monkeypatch):
    monkeypatch.delenv("MOERGE_INSTRUCTION_SET", raising=False)
    free = machine.machine_name(CPU)
    monkeypatch.setenv("MOERGE_INSTRUCTION_SET", "avx2")
    assert machine.machine_name(CPU) == f"{free}-avx2"
