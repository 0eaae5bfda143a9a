"""Peak memory, measured by the kernel of the operating system in a process of its own.

What the ops allocate they take from malloc as well as from torch, so torch's profiler would not see all of it.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
pytestmark = pytest.mark.skipif(not CLEAR.exists(), reason="peak memory is read from /proc/self/clear_refs")

COMMON = """
import ctypes, gc, json, re
from pathlib import Path
import torch
import moerge_ext as moerge
from moerge_ext import ops
torch.manual_seed(0)
torch.set_num_threads(2)
torch.set_grad_enabled(False)

def status(field):
    return int(re.search(rf"^{field}:\\s+(\\d+) kB", Path("/proc/self/status").read_text(), re.M).group(1)) * 1024

def growth(run):
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    kept = run()
    return status("VmHWM") - before
"""

OPS = """
T, D, E, K, R, O = 4096, 128, 64, 4, 16, 4096
x, base = torch.randn(T, D), torch.randn(T, O)
bank = torch.randn(D, E).t(), torch.randn(E, D, R).mT, torch.randn(E, R, O).mT
small = [t[:8] for t in (base.clone(), x)]
ops.routed_lora_(*small, *bank, top_k=K)  # threads and their scratch
weights, experts = ops.route(x, bank[0], top_k=K)
print(json.dumps({
    "routed_lora_": growth(lambda: ops.routed_lora_(base, x, *bank, top_k=K)),
    "lora_apply": growth(lambda: ops.lora_apply(base, x, *bank[1:], weights, experts)) - 4 * T * O,
}))
"""

MODEL = """
from transformers import LlamaConfig, LlamaForCausalLM
from moerge_ext.experts.bank import ExpertBank, ModuleBank
config = LlamaConfig(vocab_size=64, hidden_size=512, intermediate_size=1024, num_hidden_layers=4,
                     num_attention_heads=4, num_key_value_heads=4)
model, ids = LlamaForCausalLM(config).eval(), torch.ones(1, 512, dtype=torch.long)
call = lambda: model(input_ids=ids, logits_to_keep=1)
call()
plain, resident = growth(call), status("VmRSS")
E, R, modules = 48, 16, {}
for name, layer in model.named_modules():
    if name.startswith("model.layers") and isinstance(layer, torch.nn.Linear):
        D, O = layer.in_features, layer.out_features
        modules[name] = ModuleBank(torch.randn(E, D, R).mT, torch.randn(E, R, O).mT * 1e-3,
                                   gates={"sigmoid-gate": torch.randn(E, D)})
bank = ExpertBank(tuple(map(str, range(E))), modules)
nbytes = sum(m.nbytes for m in modules.values())
handle = moerge.patch(model, bank)
del bank, modules
model(input_ids=ids[:, :1])
gc.collect()
ctypes.CDLL(None).malloc_trim(0)
extra = status("VmRSS") - resident
print(json.dumps({"bank": nbytes, "extra": extra, "plain": plain, "routed": growth(call)}))
"""


def measure(script: str) -> dict[str, int]:
    result = subprocess.run([sys.executable, "-c", COMMON + script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_ops_need_a_small_workspace():
    """[T,E,R], [T,K,O] or a copy of the experts per token would be 16, 256 MiB or more; h is 1 MiB."""
    for op, grown in measure(OPS).items():
        assert grown < 12 * 2**20, (op, grown)


def test_a_routed_model_needs_one_copy_of_the_bank():
    found = measure(MODEL)
    assert found["bank"] > 2**26  # the bound below would notice a second copy
    assert found["extra"] < found["bank"] + 2**26, found
    assert found["routed"] < found["plain"] + 2**26, found
