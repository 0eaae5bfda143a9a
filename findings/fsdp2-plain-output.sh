#!/usr/bin/env bash
# A model under fully_shard (FSDP2) whose forward returns an object of its own class is not trained, without a word.
#
# Versions: torch 2.13.0, two processes on the CPU (gloo).
#
# Expected: fully_shard(model), forward, backward, optimizer.step() trains the model whatever its forward returns, as
#   long as the loss is computed from it; or it refuses an output that it cannot look into. A class registered with
#   torch.utils._pytree, which torch.export and others of torch look into, should do.
# What happens: FSDP2 hangs its backward hooks on the tensors it finds in the output. It finds them in a tensor, a dict,
#   a named tuple and a dataclass; in an object of an ordinary class it finds none, registered or not. Then nothing is
#   reduced: after backward each process has its own gradient, on a plain full parameter, and optimizer.step(), which
#   holds the sharded one, moves nothing. No error, no warning.
# Affected: models wrapped as a whole whose forward returns an own class with attributes (not a dataclass).
# Way around: return a dict, a dataclass or a tuple.
#
# Output seen (the right gradient is the mean, 6):
#   tensor:            gradient in process 0: 6.0, in process 1: 6.0; the step moved the weight by 6.0
#   dict:              gradient in process 0: 6.0, in process 1: 6.0; the step moved the weight by 6.0
#   named tuple:       gradient in process 0: 6.0, in process 1: 6.0; the step moved the weight by 6.0
#   dataclass:         gradient in process 0: 6.0, in process 1: 6.0; the step moved the weight by 6.0
#   plain object:      gradient in process 0: 4.0, in process 1: 8.0; the step moved the weight by 0.0
#   registered object: gradient in process 0: 4.0, in process 1: 8.0; the step moved the weight by 0.0
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${FINDINGS_PYTHON:-}  # a python that has the packages: skips the install
if [ -z "$python" ]; then
  python3 -m venv "$work/venv"
  python=$work/venv/bin/python
  "$python" -m pip install --quiet "torch==2.13.0" "numpy==2.4.6"
fi
export PYTHONWARNINGS=ignore OMP_NUM_THREADS=1

cat >"$work/train.py" <<'PYTHON'
import dataclasses, datetime, json, os, sys, typing, warnings
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils._pytree import register_pytree_node


@dataclasses.dataclass
class Data:
    y: torch.Tensor


class Named(typing.NamedTuple):
    y: torch.Tensor


class Plain:
    def __init__(self, y):
        self.y = y


class Registered(Plain):
    pass


register_pytree_node(Registered, lambda o: ([o.y], None), lambda leaves, _: Registered(*leaves))
kinds = {"tensor": lambda y: y, "dict": lambda y: {"y": y}, "named tuple": Named, "dataclass": Data,
         "plain object": Plain, "registered object": Registered}


class Model(nn.Module):
    def __init__(self, pack):
        super().__init__()
        self.a = nn.Linear(8, 8, bias=False)
        self.pack = pack

    def forward(self, x):
        return self.pack(self.a(x))


def main(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2,
                            timeout=datetime.timedelta(seconds=120))
    result = {}
    warnings.simplefilter("error")
    for kind, pack in kinds.items():
        torch.manual_seed(0)
        model = Model(pack)
        before = model.a.weight.detach().clone()
        fully_shard(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        sharded = next(model.parameters())
        out = model(torch.full((4, 8), float(rank + 1)))
        y = out if kind == "tensor" else out["y"] if kind == "dict" else out.y
        y.sum().backward()
        gradient = model.a.weight.grad
        gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        optimizer.step()
        moved = (sharded.full_tensor() - before).abs().max().item()
        result[kind] = [round(gradient.mean().item(), 4), round(moved, 4)]
    dist.barrier()
    with open(f"{folder}/rank{rank}.json", "w") as file:
        json.dump(result, file)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


main(int(sys.argv[1]), sys.argv[2])
PYTHON
"$python" "$work/train.py" 1 "$work" &
"$python" "$work/train.py" 0 "$work"
wait "$!"
"$python" - "$work" <<'PYTHON'
import json, pathlib, sys

one, two = (json.loads((pathlib.Path(sys.argv[1]) / f"rank{r}.json").read_text()) for r in (0, 1))
same = True
for kind in one:
    print(f"{kind + ':':18} gradient in process 0: {one[kind][0]}, in process 1: {two[kind][0]}; "
          f"the step moved the weight by {one[kind][1]}")
    if kind.endswith("object"):
        same = same and one[kind] == [4.0, 0.0] and two[kind] == [8.0, 0.0]
    else:
        same = same and one[kind] == two[kind] == [6.0, 6.0]
sys.exit(0 if same else "the behaviour has changed")
PYTHON
