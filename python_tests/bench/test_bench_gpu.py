"""What the benchmark does for a GPU, without one: which cells, the kernels' times, the last table, gpu_check.sh."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bench_checkout import REPO  # first: bench is importable after it
from torch.autograd import DeviceType

from bench import cells, data, gpu_table, kernel_time, linear, results, run, timing

CPU = torch.device("cpu")
CELL = cells.Cell(64, 48, 5, 2, 4, 9)
PARTS = ("build", "tests", "sanitizer", "linear", "graphs", "kernels", "sweep", "model", "table")


def test_gpu_and_gpu_wide_are_the_whole_grid():
    first, rest = cells.gpu_cells(), cells.gpu_wide_cells()
    grid = product(("bfloat16", "float16"), (8, 36, 166, 512), (1, 8, 16, 32, 64, 128, 512, 1024, 4096, 16384))
    want = {cells.Cell(4096, 4096, e, 2, 16, t, dtype) for dtype, e, t in grid}
    assert set(first) | set(rest) == want and len(first) + len(rest) == len(want) and len(first) == 15


def test_float16():
    """Every candidate agrees with the reference (that they are timed, a cell of another type shows)."""
    cell = replace(CELL, dtype="float16")
    weights = data.Weights(cell, CPU, run.TINY)
    tokens = data.Tokens(cell, weights)
    ability = {"bandwidth": 10.0, "float32": 10.0}
    with torch.no_grad():
        good, rows = linear.admit(linear.peers_of(cell, weights, tokens), cell, tokens, ability, run.TINY)
    assert {row["status"] for row in rows} == {"skipped"}
    assert {"ours", "dense", "sort_loop", "gather_bmm", "peft_arrow", "ours_arrow"} <= {c.label for c in good}


def event(key, us, count, device=DeviceType.CUDA, is_user_annotation=False):
    """What torch's profiler says of one name."""
    more = {"device_type": device, "is_user_annotation": is_user_annotation}
    return SimpleNamespace(key=key, self_device_time_total=us, count=count, **more)


SEEN = [
    event("aten::mm", 60.0, 2, DeviceType.CPU),  # an op is credited with what it launched
    event("span", 99.0, 1, is_user_annotation=True),
    event("short", 20.0, 4),
    event("long", 60.0, 2),
]


def test_kernels_are_summed_per_call():
    assert kernel_time.summarize(SEEN, 2) == {
        "kernel_us": 40.0,
        "launches": 3.0,
        "kernels": {"long": 30.0, "short": 10.0},
    }
    assert kernel_time.summarize(SEEN[:2], 2) == {}


def test_the_profiler_has_these_fields():
    clock = timing.Clock(CPU)
    found = kernel_time.profiled(lambda i: torch.ones(3) @ torch.ones(3), 2, 1, clock)
    assert [e.count for e in found if e.key == "aten::dot"] == [2]
    assert kernel_time.summarize(found, 2) == {}


def test_the_table_shows_kernels_beside_wall_time(tmp_path, monkeypatch, capsys):
    arguments = ["--tiny", "--threads", "1", "--results", str(tmp_path), "--filter", "mode=routed"]
    assert run.main(["linear", *arguments]) == 0
    monkeypatch.setattr(kernel_time, "profiled", lambda *_: SEEN)
    assert run.main(["kernels", *arguments]) == 0
    assert {row["suite"] for row in results.read_all(tmp_path)} == {"linear", "kernels"}
    monkeypatch.setattr(sys, "argv", ["gpu_table.py", "--device", "cpu", "--results", str(tmp_path)])
    capsys.readouterr()
    assert gpu_table.main() == 0
    head, *table = capsys.readouterr().out.splitlines()
    assert "kernels: plain" in head and len(table) == 2
    assert all(line[head.index("kernels: plain") :].split()[:2] == ["4.0", "4.0"] for line in table)


def check(*arguments, program=REPO / "bench" / "gpu_check.sh", before=(), **env):
    return subprocess.run(
        [*before, "bash", program, *arguments], capture_output=True, text=True,
        env=os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | env,
    )  # fmt: skip


@pytest.mark.parametrize(
    "parts", [("linear", "table"), pytest.param(PARTS, marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_the_gpu_check_runs_without_a_gpu(tmp_path, parts):
    """The dry run: the parts in order, a table last."""
    done = check("--device", "cpu", "--tiny", "--results", tmp_path, "--part", ",".join(parts))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert re.findall(r"^== (\w+): ok", done.stdout, re.MULTILINE) == list(parts)
    table = done.stdout.partition("== table\n")[2].splitlines()
    assert table[0].split()[0] == "cell" and len(table) > 3
    assert ("saw no kernels" in done.stdout) == ("kernels" in parts)


def test_the_gpu_check_tells_what_it_does_not_know_and_what_failed(tmp_path):
    bad = check("--nonsense")
    assert bad.returncode == 2 and "unknown option" in bad.stderr
    failed = check("--part", "table", "--device", "none")
    assert failed.returncode == 1 and "gpu_check: failed: table" in failed.stderr


@pytest.mark.slow
def test_the_gpu_check_builds_without_network_git_or_setuptools(tmp_path):
    """As on a machine that got nothing but the working tree."""
    if subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode:
        pytest.skip("needs unshare, to take the network away")
    listed = subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        if name.startswith(("csrc/", "moerge_ext/", "bench/")) or name == "CMakeLists.txt":
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(REPO / name, tmp_path / name)
    absent = tmp_path / "absent"
    absent.mkdir()
    (absent / "setuptools.py").write_text("raise ImportError('not here')")
    tools = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    program = tmp_path / "bench" / "gpu_check.sh"
    arguments = ("--device", "cpu", "--part", "build")
    done = check(*arguments, program=program, before=("unshare", "-rn"), PYTHONPATH=str(absent), PATH=tools)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "Linking CXX shared module out/_kernels.so" in done.stdout and "All fits." in done.stdout
