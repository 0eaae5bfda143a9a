"""Peak memory of one variant of the model, in a process of its own."""

from __future__ import annotations

import ctypes
import gc
import json
import re
from pathlib import Path

import torch

from .cells import DTYPES
from .model_build import SIZES, arrow_model, llama, make_bank

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def status(field: str) -> float:
    """MiB of a field of /proc/self/status."""
    found = re.search(rf"^{field}:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {field}")
    return int(found.group(1)) / 1024


def reset(device: torch.device) -> float:
    """Forgets the peak so far; MiB in use now."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device) / 2**20
    ctypes.CDLL(None).malloc_trim(0)  # what building left in the allocator is not the model's
    CLEAR.write_text("5")
    return status("VmRSS")


def _peak(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return status("VmHWM")


@torch.no_grad()
def main(size_name: str, dtype_name: str, device_name: str, variant: str, threads: str) -> None:
    """Prints {"built_mib", "peak_mib"}: resident after building, and the peak of a prefill and four tokens."""
    torch.set_num_threads(int(threads))
    size, device, dtype = SIZES[size_name], torch.device(device_name), DTYPES[dtype_name]
    model = llama(size, dtype, device)
    if variant != "plain":
        bank = make_bank(model, size, dtype, device)
        if variant == "ours":
            import moerge_ext

            moerge_ext.patch(model, bank, "phatgoose", top_k=size.top_k)
        else:
            model = arrow_model(model, bank, size)
        del bank
    # one token first: libraries load and PEFT builds its prototypes on the first call
    model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device))
    built = reset(device)
    ids = torch.ones(1, size.tokens, dtype=torch.long, device=device)
    cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
    for _ in range(4):
        cache = model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True).past_key_values
    print(json.dumps({"built_mib": round(built, 1), "peak_mib": round(_peak(device), 1)}))
