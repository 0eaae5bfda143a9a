#!/usr/bin/env bash
# A checkpoint that notes torch.__version__ can be saved, but not loaded with torch.load's defaults.
#
# Versions: torch 2.13.0.
#
# Expected: torch.__version__ is a string: it prints as one, isinstance(torch.__version__, str) is true, json writes it
#   as one. A dict of strings and tensors is what torch.load reads by default (weights_only=True).
# What happens: torch.__version__ is a TorchVersion, a subclass of str, and torch.save keeps the class. torch.load
#   raises UnpicklingError, "Unsupported global: GLOBAL torch.torch_version.TorchVersion". torch's own name for its own
#   version is not on its list of safe classes, and saving gives no sign.
# Affected: training scripts that note the version for later: {"model": ..., "torch": torch.__version__}. The failure
#   shows when the checkpoint is needed.
# Way around: save str(torch.__version__), which is a plain str. For a file already written: the error names
#   torch.serialization.safe_globals([TorchVersion]), which reads it with weights_only=True still on.
#
# Output seen:
#   isinstance of str: True; type: TorchVersion; json: a string
#   torch.__version__: UnpicklingError, names TorchVersion: True
#   str(torch.__version__): loads, as str
#   the first file under safe_globals([TorchVersion]): loads
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

"$python" - "$work" <<'PYTHON'
import json, pathlib, pickle, sys
import torch

work = pathlib.Path(sys.argv[1])
version = torch.__version__
kind = type(version).__name__
as_json = json.loads(json.dumps(version))
print(f"isinstance of str: {isinstance(version, str)}; type: {kind}; json: "
      f"{'a string' if type(as_json) is str and as_json == version else 'something else'}")

torch.save({"weight": torch.ones(2), "torch": version}, work / "noted.pt")
try:
    torch.load(work / "noted.pt")
    raised, named = "loads", False
except pickle.UnpicklingError as error:
    raised, named = "UnpicklingError", "torch.torch_version.TorchVersion" in str(error)
print(f"torch.__version__: {raised}, names TorchVersion: {named}")

torch.save({"weight": torch.ones(2), "torch": str(version)}, work / "plain.pt")
plain = type(torch.load(work / "plain.pt")["torch"]).__name__
print(f"str(torch.__version__): loads, as {plain}")
with torch.serialization.safe_globals([type(version)]):
    again = torch.load(work / "noted.pt", weights_only=True)
print("the first file under safe_globals([TorchVersion]): loads")

same = (isinstance(version, str) and kind == "TorchVersion" and as_json == version and named
        and plain == "str" and again["torch"] == version)
sys.exit(0 if same else "the behaviour has changed")
PYTHON
