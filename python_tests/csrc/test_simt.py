"""The CUDA kernels without a GPU: built for the host against the emulator of csrc/simt, which has tests of its own.

CI runs the op tests over them in their small and odd sizes (but for ops/test_torch.py, which is about torch), and
holds that every kernel of cuda_resources.json has run. The slow tests add that file, sanitizers and other orders of
threads. By hand, with the slow op tests too: `cmake -S . -B build/simt -DMOERGE_SIMT=ON ...` (as `simt_build` below),
then `pytest --simt build/simt/out/_simt.so python_tests/ops`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import build_tools
import cuda_resources
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
# the op tests in two processes of about the same length
OPS = Path("python_tests", "ops")
FIRST = ["test_autograd.py", "test_lora.py"]
REST = sorted({path.name for path in (ROOT / OPS).glob("test_*.py")} - {*FIRST, "test_torch.py", "test_cuda_graphs.py"})


@pytest.fixture(scope="session")
def simt_build(request):
    """Builds one target of csrc/simt and returns the folder it is in; later runs only build what changed."""
    if request.config.getoption("--simt"):
        pytest.skip("the emulator is in use already")
    if not (ROOT / "CMakeLists.txt").exists():
        pytest.skip("needs the source tree")
    if not build_tools.has("cmake") or not (build_tools.has("c++") or build_tools.has("g++")):
        pytest.skip("needs cmake and a C++ compiler")

    def build(target: str, sanitize: str = "") -> Path:
        folder = ROOT / "build" / ("simt-sanitized" if sanitize else "simt")
        options = [f"-DPython_EXECUTABLE={sys.executable}", "-DMOERGE_SIMT=ON", "-DMOERGE_CUDA=OFF"]
        build_tools.cmake(ROOT, folder, [*options, f"-DMOERGE_SIMT_SANITIZE={sanitize}"], [target])
        return folder / "out"

    return build


@pytest.mark.parametrize("sanitize", ["", "address,undefined"], ids=["plain", "sanitized"])
def test_the_emulator_catches_planted_bugs(simt_build, sanitize):
    done = subprocess.run([simt_build("simt_selftest", sanitize) / "simt_selftest"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("0 failed\n"), done.stdout + done.stderr


def over_the_emulator(library: Path, *arguments: str, **env: str) -> subprocess.Popen:
    """pytest with the CUDA kernels in place of the CPU's."""
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", "--simt", library, "-m", "not slow", *arguments], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
    )  # fmt: skip


def passed(*runs: subprocess.Popen) -> None:
    """Waits for all of them first, so that none is left behind."""
    for run, said in [(run, run.communicate()[0]) for run in runs]:
        assert run.returncode == 0, said[-4000:]
        assert "registered at" in said and "csrc/cuda/bind_" in said, "it ran without the CUDA kernels"


def launched(file: Path) -> set[str]:
    """The kernels that have run, each instance by the name that nvcc has for it in cuda_resources.json."""
    return set(cuda_resources.short_names(file.read_text().split()).values())


def test_op_tests_over_the_emulator(simt_build, tmp_path):
    """Every op, forward and backward; together they run every kernel."""
    library = simt_build("_simt") / "_simt.so"
    runs, notes = [], [tmp_path / "first", tmp_path / "rest"]
    for note, files in zip(notes, (FIRST, REST), strict=True):
        files = [str(OPS / name) for name in files]
        runs.append(over_the_emulator(library, *files, MOERGE_SIMT_LAUNCHED=str(note)))
    passed(*runs)
    found = set().union(*map(launched, notes))
    compiled = set(json.loads(cuda_resources.TABLE.read_text())["kernels"])
    assert compiled <= found, f"no test runs {sorted(compiled - found)}; or else renew the table"


@pytest.mark.slow
def test_tests_of_torch_over_the_emulator(simt_build):
    passed(over_the_emulator(simt_build("_simt") / "_simt.so", str(OPS / "test_torch.py")))


SANITIZERS = "address,undefined"
# sizes that are no multiples of 16 bytes, where something lies between the data and the page behind it
SANITIZED = [f"test_{op}.py" for op in ("16bit", "16bit_gradients", "mix", "grid", "cuda", "autograd")]


def run_sanitized(library: Path, *arguments: str) -> subprocess.CompletedProcess:
    """pytest over a library that is built with SANITIZERS: their libraries come first, and C++'s for its exceptions."""
    names = ("libasan.so", "libubsan.so", "libstdc++.so.6")
    found = [subprocess.check_output(["c++", f"-print-file-name={name}"], text=True).strip() for name in names]
    if not all(Path(path).is_absolute() for path in found):
        pytest.skip("needs libasan and libubsan of the compiler")
    env = os.environ | {"LD_PRELOAD": " ".join(found), "UBSAN_OPTIONS": "print_stacktrace=1"}
    env["ASAN_OPTIONS"] = "detect_leaks=0:detect_stack_use_after_return=0"
    command = [sys.executable, "-m", "pytest", "-s", "-m", "not slow", "--simt", library, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)


@pytest.mark.slow
@pytest.mark.parametrize("file", SANITIZED)
def test_the_kernels_under_sanitizers(simt_build, file):
    """`pytest -m slow python_tests/csrc/test_simt.py -k sanitizers`: accesses out of bounds, misaligned, overflows."""
    done = run_sanitized(simt_build("_simt", SANITIZERS) / "_simt.so", str(OPS / file))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]


@pytest.mark.slow
def test_the_sanitizers_see_a_read_that_changes_no_result(simt_build, tmp_path):
    """One number past the end of the logits, within the 16 bytes that nothing else watches, and its maximum unused."""
    library = simt_build("_simt", SANITIZERS) / "_simt.so"
    planted = plant(library, "mix.cu", "v < p.V; v += kThreads) highest", "v <= p.V; v += kThreads) highest", tmp_path)
    chosen = (str(OPS / "test_mix.py"), "-k", "test_matches_reference and 41 and dtype0")
    assert run_sanitized(library, *chosen).returncode == 0
    done = run_sanitized(planted, *chosen)
    assert done.returncode != 0 and "ERROR: AddressSanitizer" in done.stderr and "mix.cu:" in done.stderr, done.stderr


def plant(library: Path, source: str, old: str, new: str, folder: Path) -> Path:
    """The library with one kernel file changed."""
    text = (ROOT / "csrc" / "cuda" / source).read_text()
    assert text.count(old) == 1
    (folder / source).write_text(text.replace(old, new))
    build = library.parents[1]
    objects = [path for path in build.glob("csrc/simt/CMakeFiles/_simt.dir/**/*.o") if path.name != f"{source}.o"]
    includes = [f"-I{ROOT / 'csrc' / name}" for name in ("simt", "cuda")]
    compiler = ["c++", "-shared", "-fPIC", "-std=c++20", "-O1", "-g1", f"-fsanitize={SANITIZERS}"]
    torch_lib = Path(torch.__file__).parent / "lib"
    done = subprocess.run(
        [*compiler, *includes, *objects, "-x", "c++", folder / source, "-o", folder / "planted.so",
         f"-L{torch_lib}", f"-Wl,-rpath,{torch_lib}", "-ltorch", "-ltorch_cpu"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "planted.so"


@pytest.mark.slow
@pytest.mark.parametrize("seed", ["0", "7"])
def test_another_order_of_threads_and_early_copies(simt_build, seed):
    """The kernels that copy asynchronously, in order and in another order, with copies that land at once."""
    library = simt_build("_simt") / "_simt.so"
    more = {"MOERGE_SIMT_SEED": seed, "MOERGE_SIMT_COPIES": "early"}
    files = (str(OPS / "test_16bit.py"), str(OPS / "test_16bit_gradients.py"))
    passed(over_the_emulator(library, *files, "-k", "shapes or pairs_per_expert", **more))
