"""The CUDA kernels under nvcc, which needs no GPU: every source for every architecture, and what each kernel takes.

The committed table cuda_resources.json says what to expect; `python python_tests/csrc/cuda_resources.py` renews it. And
the whole extension against a CUDA torch: `python python_tests/csrc/cuda_extension.py`.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import cuda_extension
import cuda_resources
import pytest

from moerge_ext.native import loading as _native

needs_nvcc = pytest.mark.skipif(cuda_resources.nvcc() is None, reason="needs nvcc")
TABLE = json.loads(cuda_resources.TABLE.read_text())
KERNELS = TABLE["kernels"]
HELD = {"80", "90"}  # architectures that the table must have


def of(*parts: str) -> list[str]:
    return [name for name in KERNELS if any(part in name for part in parts)]


def test_the_table_covers_every_source_and_architecture():
    assert all(HELD <= set(per) <= set(cuda_resources.ARCHITECTURES) for per in KERNELS.values())
    sources = cuda_resources.sources()
    for name in KERNELS:
        assert any(cuda_resources.in_source(name, source) for source in sources), f"{name} is in no source"
    for source in sources:
        assert any(cuda_resources.in_source(name, source) for name in KERNELS), f"{source.name} is not in the table"


@pytest.mark.parametrize("name", of("Mma<"))
def test_tensor_core_kernels(name):
    """Tensor cores, asynchronous 16-byte copies, no spills (the scores: some bytes from sm_100 on), registers for three
    blocks (of 256 threads: two; the largest kernels, of 128 ranks in two parts or many experts: one).
    """
    scores, one_block = name.startswith("RouteScores"), ("128, 2", "float, ", " 40>", " 56>")
    most = 168 if not (scores or "LoraOuter" in name) else 255 if any(part in name for part in one_block) else 128
    for architecture, found in KERNELS[name].items():
        assert found["spills"] <= (200 if scores and int(architecture) >= 100 else 0), (architecture, found)
        assert found["registers"] <= most, (architecture, found)
        assert found["mma"] > 0 and found["copy16"] > 0, (architecture, found)


@pytest.mark.parametrize("name", of("RoutedDecode<"))
def test_the_one_launch_of_few_tokens(name):
    """Tensor cores, registers for a block of 512 threads, no spills (a few bytes before sm_90)."""
    for architecture, found in KERNELS[name].items():
        assert found["spills"] <= (0 if int(architecture) >= 90 else 40), (architecture, found)
        assert found["registers"] <= 128, (architecture, found)
        assert found["mma"] > 0 and found["load16"] > 0, (architecture, found)


NO_VECTORS = ("RoutedDecode", "RouteSelect")  # their 8 is another


@pytest.mark.parametrize("name", [n for n in of(", 8>", "LoraShrinkRanks<") if not n.startswith(NO_VECTORS)])
def test_vector_kernels(name):
    """16-byte loads and, for 16-bit x, no spills (float32 may keep a few bytes around a call of a square root)."""
    for architecture, found in KERNELS[name].items():
        assert found["spills"] <= (16 if "<float, float" in name else 0), (architecture, found)
        assert found["load16"] > 0, (architecture, found)


@pytest.mark.parametrize("name", [n for n in of("LoraExpand") if n.endswith(", 8>") or "Mma" in n])
def test_results_are_stored_16_bytes_at_a_time(name):
    for architecture, found in KERNELS[name].items():
        assert found["store16"] > 0, (architecture, found)


def test_the_digest_covers_headers(tmp_path):
    (tmp_path / "a.cu").write_text('#include "b.h"\n')
    (tmp_path / "b.h").write_text('#include "c.h"\n')
    (tmp_path / "c.h").write_text("int c;\n")
    before = cuda_resources.digest(tmp_path / "a.cu")
    (tmp_path / "c.h").write_text("int d;\n")
    assert cuda_resources.digest(tmp_path / "a.cu") != before


@needs_nvcc
@pytest.mark.parametrize("source", cuda_resources.sources(), ids=lambda s: s.stem)
def test_a_source_that_changed_compiles(source, tmp_path):
    """For one architecture, and only what has changed since it compiled for all: CI has minutes."""
    if cuda_resources.checked().get(source.stem) != cuda_resources.digest(source):
        cuda_resources.compile_source(source, tmp_path, ("90",))


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize("source", cuda_resources.sources(), ids=lambda s: s.stem)
def test_every_source_compiles_for_every_architecture(source, tmp_path):
    target, said = cuda_resources.compile_source(source, tmp_path)
    found = cuda_resources.read_ptxas(said)
    assert set(found) <= set(KERNELS), "kernels that the table lacks: renew it"
    if cuda_resources.nvcc_version() != TABLE["nvcc"]:
        pytest.skip(f"it compiles; the table is for nvcc {TABLE['nvcc']}")
    if cuda_resources.cuobjdump():
        cuda_resources.add_instructions(target, found)
    for name, per in found.items():
        for architecture, numbers in per.items():
            expected = KERNELS[name].get(architecture, numbers)
            assert {k: expected[k] for k in numbers} == numbers, f"{name} for sm_{architecture}: renew the table"


@needs_nvcc
def test_an_extension_that_changed_builds_and_imports():
    if cuda_resources.checked().get(cuda_extension.NAME) != cuda_extension.digest(cuda_extension.went_in()):
        python = cuda_extension.cuda_python()
        assert python, f"csrc has changed since it was built against a CUDA torch. Run {cuda_extension.COMMAND}"
        cuda_extension.check(python)


@pytest.mark.slow
@needs_nvcc
def test_the_extension_builds_against_a_cuda_torch_and_imports():
    """Whether it has changed or not."""
    python = cuda_extension.cuda_python()
    if python is None:
        pytest.skip("needs a CUDA torch: $MOERGE_CUDA_PYTHON")
    assert "ops with CUDA kernels" in cuda_extension.check(python)


def test_ops_without_cuda_kernels_are_named():
    """The build of these tests, where it is one for the CPU."""
    if _native.build_info()["cuda"]:
        pytest.skip("it has CUDA kernels")
    module = Path(importlib.import_module("moerge_ext._C").__file__)
    with pytest.raises(AssertionError, match="there is none for .*moerge::route, moerge::route_backward"):
        cuda_extension.import_there(sys.executable, _native.kernels_path(), module)


def test_the_digest_of_the_extension_covers_what_nvcc_and_torch_see():
    names = {path.relative_to(cuda_extension.ROOT).as_posix() for path in cuda_extension.went_in()}
    assert names >= {
        "CMakeLists.txt",
        "csrc/ops.cpp",
        "csrc/common/check.h",
        "csrc/cuda/bind_lora.cpp",
        "csrc/cuda/mix.cu",
    }
