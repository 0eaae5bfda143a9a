"""The calls to the Triton kernels of vLLM and SGLang, with stand-ins of the same signatures in torch."""

import sys
from dataclasses import replace
from pathlib import Path

import bench_checkout  # noqa: F401  (first: bench is importable after it)
import pytest
import torch

from bench import cells, data, linear, render, results, run, triton_peers

CPU = torch.device("cpu")
CELL = cells.Cell(64, 48, 5, 2, 4, 9, "bfloat16", only=tuple(triton_peers.ENGINES))
ABILITY = {"bandwidth": 10.0, "float32": 10.0}

VLLM = """
import torch
from . import utils

class LoRAKernelMeta:
    @staticmethod
    def make(max_loras, max_num_tokens, device, captured_lora_counts=None):
        meta = LoRAKernelMeta()
        meta.no_lora_flag_cpu = torch.tensor([False])
        meta.num_active_loras_cpu = torch.tensor([0], dtype=torch.int32)
        return meta

    def meta_args(self, token_nums, specialize_active_lora):
        assert specialize_active_lora
        return (self.token_lora_mapping[:token_nums], self.token_indices_sorted_by_lora_ids[:token_nums],
                self.num_tokens_per_lora, self.lora_token_start_loc, self.active_lora_ids, self.no_lora_flag_cpu,
                self.num_active_loras_cpu)

def rows(mapping, order, counts, starts, ids, none, active):
    assert len(mapping) == len(order) and len(ids) == len(counts) == len(starts) - 1 and not none.item()
    for g in range(active.item()):
        mine = order[starts[g] : starts[g] + counts[g]].long()
        assert (mapping[mine] == ids[g]).all()
        yield mine, ids[g].item()

def lora_shrink(inputs, lora_a_weights, output_tensor, mapping, order, counts, starts, ids, none, active, scaling):
    (a,), (out,) = lora_a_weights, output_tensor
    assert a.is_contiguous() and a.dtype in (torch.bfloat16, torch.float16) and inputs.dtype == a.dtype
    utils._LORA_A_PTR_DICT[a.data_ptr()] = a
    out.zero_()
    for mine, e in rows(mapping, order, counts, starts, ids, none, active):
        out[mine] += scaling * (inputs[mine].float() @ a[e].float().T)

def lora_expand(inputs, lora_b_weights, output_tensor, mapping, order, counts, starts, ids, none, active,
                offset_start=0, add_inputs=False):
    (h,), (b,) = inputs, lora_b_weights
    assert b.is_contiguous() and output_tensor.is_contiguous() and b.shape[1:] == (output_tensor.shape[1], h.shape[1])
    for mine, e in rows(mapping, order, counts, starts, ids, none, active):
        kept = output_tensor[mine] if add_inputs else 0
        output_tensor[mine] = kept + (h[mine] @ b[e].float().T).to(output_tensor.dtype)
"""

SGLANG = """
from dataclasses import dataclass
import torch

@dataclass
class LoRABatchInfo:
    use_cuda_graph: bool
    bs: int
    num_segments: int
    seg_indptr: torch.Tensor
    weight_indices: torch.Tensor
    lora_ranks: torch.Tensor
    scalings: torch.Tensor
    max_len: int
    seg_lens: torch.Tensor
    permutation: torch.Tensor = None

def product(x, weights, info, out, scaled):
    assert x.is_contiguous() and weights.is_contiguous() and x.shape[1] == weights.shape[2]
    assert info.max_len >= 16 and info.max_len & (info.max_len - 1) == 0
    for g in range(info.num_segments):
        begin, end, e = info.seg_indptr[g].item(), info.seg_indptr[g + 1].item(), info.weight_indices[g].item()
        assert 0 <= end - begin <= info.max_len and info.seg_lens[g] == end - begin
        mine = info.permutation[begin:end].long()
        y = (x[mine].float() @ weights[e].float().T) * (info.scalings[e] if scaled else 1)
        out[mine] += y.to(out.dtype)
    return out

def shrink(x, weights, info):
    return product(x, weights, info, x.new_zeros(len(x), weights.shape[1]), False)
"""

KERNELS = {
    "chunked_sgmv_shrink": """
def chunked_sgmv_lora_shrink_forward(x, weights, batch_info, num_slices, split_k=None):
    assert num_slices == 1
    return shrink(x, weights, batch_info)
""",
    "chunked_sgmv_expand": """
def chunked_sgmv_lora_expand_forward(x, weights, batch_info, slice_offsets, max_slice_size, base_output,
                                     slice_offsets_cpu=None):
    assert slice_offsets.tolist() == [0, weights.shape[1]] and max_slice_size == weights.shape[1]
    return product(x, weights, batch_info, base_output, True)
""",
    "sgemm_lora_a": """
def sgemm_lora_a_fwd(x, weights, batch_info, stack_num=1):
    return shrink(x, weights, batch_info)
""",
    "sgemm_lora_b": """
def sgemm_lora_b_fwd(x, weights, batch_info, base_output=None):
    return product(x, weights, batch_info, base_output, True)
""",
}


def write(folder: Path, modules: dict[str, str]) -> Path:
    for name, text in modules.items():
        path = folder / (name.replace(".", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.fixture
def engines(monkeypatch):
    """Triton's peers allowed on the CPU; what they import and where from is undone afterwards."""

    def drop():
        for name in [name for name in sys.modules if name.split(".")[0] in ("vllm", "sglang")]:
            del sys.modules[name]

    monkeypatch.setattr(triton_peers, "DEVICE", "cpu")
    monkeypatch.setattr(sys, "path", list(sys.path))
    drop()
    yield
    drop()


@pytest.fixture(params=["sglang.kernels.ops.lora.dense", "sglang.srt.lora.triton_ops"])
def folder(request, engines, tmp_path) -> Path:
    """With SGLang's kernels where they are now, and where they were."""
    tables = "_LORA_A_PTR_DICT, _LORA_B_PTR_DICT = {}, {}"
    head = "from sglang.srt.lora.utils import product, shrink\n"
    return write(
        tmp_path / "packages",
        {"vllm.lora.ops.triton_ops.__init__": VLLM, "vllm.lora.ops.triton_ops.utils": tables}
        | {"sglang.srt.lora.utils": SGLANG}
        | {f"{request.param}.{name}": head + text for name, text in KERNELS.items()},
    )


def admitted(cell: cells.Cell, folder: Path | None) -> tuple[list[str], list[dict]]:
    weights = data.Weights(replace(cell, only=None), CPU, run.TINY)
    tokens = data.Tokens(cell, weights)
    found = triton_peers.candidates(cell, weights, tokens, folder)
    good, rows = linear.admit(found, cell, tokens, ABILITY, run.TINY)
    return [candidate.label for candidate in good], rows


# one row per group; sorted rows with empty experts; chunks of 16 and one of 64 rows; K = 1
SHAPES = [(9, 5, 2), (40, 12, 2), (150, 3, 3), (120, 40, 1)]


@pytest.mark.parametrize("mode", cells.MODES)
@pytest.mark.parametrize("popularity", ["zipf", "all-same"])
@pytest.mark.parametrize(("T", "E", "K"), SHAPES)
def test_the_kernels_get_the_right_rows(folder, T, E, K, popularity, mode):
    cell = replace(CELL, T=T, E=E, K=K, popularity=popularity, mode=mode)
    assert admitted(cell, folder) == (list(triton_peers.ENGINES), [])


def test_a_run_records_them_and_the_tables_name_them(folder, tmp_path):
    arguments = ["linear", "--tiny", "--threads", "1", "--results", str(tmp_path / "rows"), "--filter", "T=9"]
    assert run.main([*arguments, "--triton-peers", str(folder)]) == 0
    rows = results.read_all(tmp_path / "rows")
    mine = [row for row in rows if row["candidate"] in triton_peers.ENGINES]
    assert [(row["candidate"], row["status"]) for row in mine] == [(name, "ok") for name in triton_peers.ENGINES]
    assert "| vllm_triton | sglang_csgmv | sglang_sgemm |" in render.peers(rows, tmp_path)
    assert run.main(arguments) == 0  # without them it is another measurement
    assert {row["status"] for row in results.read_all(tmp_path / "rows")} == {"ok", "skipped"}


def test_vllm_keeps_no_weights(folder):
    admitted(CELL, folder)
    table = sys.modules["vllm.lora.ops.triton_ops.utils"]._LORA_A_PTR_DICT
    assert table
    linear._free()
    assert not table


def test_a_failing_kernel_is_a_failed_candidate(folder):
    broken = "def sgemm_lora_a_fwd(*inputs):\n    raise AssertionError('no such tile in /some/where/kernel.py')\n"
    (path,) = folder.rglob("sgemm_lora_a.py")
    path.write_text(broken)
    good, (row,) = admitted(CELL, folder)
    assert good == ["vllm_triton", "sglang_csgmv"] and (row["candidate"], row["status"]) == ("sglang_sgemm", "failed")
    assert "AssertionError: no such tile in kernel.py" in row["note"]


def test_skipped_by_name(engines, tmp_path, monkeypatch):
    def notes(cell: cells.Cell, folder: Path | None) -> str:
        good, rows = admitted(cell, folder)
        assert good == [] and [row["candidate"] for row in rows] == list(triton_peers.ENGINES)
        assert {row["status"] for row in rows} == {"skipped"} and not any(row["own"] for row in rows)
        (note,) = {row["note"] for row in rows if row["candidate"] != "vllm_triton"}
        return note

    assert "--triton-peers DIR" in notes(CELL, None)
    assert "bfloat16 and float16" in notes(replace(CELL, dtype="float32"), tmp_path)
    assert "ModuleNotFoundError: No module named 'sglang'" in notes(CELL, tmp_path)
    write(tmp_path, {"sglang.srt.lora.utils": "raise OSError('/some/where/lib.so: not for this machine')"})
    note = notes(CELL, tmp_path)
    assert "OSError: lib.so: not for this machine" in note and str(tmp_path) not in note
    monkeypatch.setattr(triton_peers, "DEVICE", "cuda")
    assert notes(CELL, tmp_path) == "Triton kernels need --device cuda, this run is on cpu"


def test_what_is_skipped_everywhere_is_one_line(tmp_path):
    row = {"suite": "linear", "machine": "m", "threads": 1, "time": "now"}
    row |= dict.fromkeys(("isa", "torch", "peft", "commit"), "")
    row |= {"candidate": "vllm_triton", "status": "skipped", "note": "no GPU"} | CELL.describe()
    text = render.losing([row, row | {"T": 1}], tmp_path)
    assert text.count("no GPU") == 1 and "| **m** | 2 cells |  | vllm_triton | skipped | no GPU |" in text
