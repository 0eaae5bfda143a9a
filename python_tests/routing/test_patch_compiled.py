"""generate() of a patched model with a static cache, its steps under torch.compile: the same tokens as eager."""

from __future__ import annotations

import patch_cases as cases
import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig

import moerge_ext as moerge
from moerge_ext.routing import ways

needs_gpu = pytest.mark.skipif(
    not (torch.cuda.is_available() and moerge.build_info()["cuda"]), reason="needs a GPU and CUDA kernels"
)


@pytest.mark.parametrize(
    "device, mode, fused",
    [
        pytest.param("cpu", "default", False, marks=pytest.mark.slow),
        pytest.param("cpu", "default", True, marks=pytest.mark.slow),
        pytest.param("cuda", "default", True, marks=needs_gpu),
        pytest.param("cuda", "reduce-overhead", True, marks=needs_gpu),
    ],
)
def test_same_tokens_as_eager(device, mode, fused, tmp_path, monkeypatch):
    """Twice: the second run replays what the first compiled (on a GPU in this mode: captured graphs)."""
    monkeypatch.setattr(ways, "FUSED_DEVICES", {device} if fused else set())
    model = cases.build("llama")
    experts = cases.bank("llama", model, tmp_path)
    model.to(device)
    compiling = CompileConfig(mode=mode, fullgraph=False)
    compiling._compile_all_devices = True  # transformers compiles on the CPU only when told so
    inputs = {name: value.to(device) for name, value in cases.batch("llama").items()}
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    plain = model.generate(**inputs, **options)
    counters.clear()
    with moerge.patch(model, experts):
        eager = model.generate(**inputs, **options)
        assert not counters["stats"].get("unique_graphs")
        for _ in range(2):
            compiled = model.generate(**inputs, **options, cache_implementation="static", compile_config=compiling)
            assert torch.equal(compiled, eager)
    assert counters["stats"]["unique_graphs"] > 0 and not torch.equal(eager, plain)
