#!/usr/bin/env bash
# An op registered through torch's stable ABI loses memory at every call when it takes a std::string.
#
# Versions: torch 2.13.0 (pytorch #190493).
#
# Expected: STABLE_TORCH_LIBRARY with TORCH_BOX converts a str argument to std::string for the call and frees it.
# What happens: the string that torch hands over was made by `new`, and the conversion copies it and deletes nothing. A
#   call keeps 48 bytes per string argument, for ever. An op with an int in its place keeps nothing.
# Affected: extensions built against the stable ABI, as is recommended for those that outlive a torch version, whose ops take
#   an option by its name. The bytes are few, but they lie between the tensors of the calls: a model with some hundred
#   such calls a token grew by 330 MB in 200 tokens, since freed blocks no longer fit the next tensors.
# Way around: integers for such options; or a type of one's own with a conversion that calls torch_delete_string.
#
# Output seen:
#   int argument: bytes kept by a call: 0
#   str argument: bytes kept by a call: 48
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${FINDINGS_PYTHON:-}  # a python that has the packages: skips the install
if [ -z "$python" ]; then
  python3 -m venv "$work/venv"
  python=$work/venv/bin/python
  "$python" -m pip install --quiet "torch==2.13.0" "numpy==2.4.6" setuptools ninja
fi
export PYTHONWARNINGS=ignore OMP_NUM_THREADS=1 TORCH_EXTENSIONS_DIR=$work/build
PATH=$(dirname "$python"):$PATH

cat > "$work/op.cpp" <<'CPP'
#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <string>

int64_t of_int(int64_t number) { return number; }
int64_t of_str(std::string text) { return static_cast<int64_t>(text.size()); }

STABLE_TORCH_LIBRARY(strings, library) {
  library.def("of_int(int number) -> int");
  library.def("of_str(str text) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(strings, CompositeExplicitAutograd, library) {
  library.impl("of_int", TORCH_BOX(&of_int));
  library.impl("of_str", TORCH_BOX(&of_str));
}
CPP

"$python" - "$work/op.cpp" <<'PYTHON'
import ctypes
import sys

import torch
from torch.utils.cpp_extension import load

FLAGS = ["-O1", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
load(name="strings", sources=[sys.argv[1]], extra_cflags=FLAGS, is_python_module=False)


class Heap(ctypes.Structure):
    names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [(name, ctypes.c_size_t) for name in names]


in_use = ctypes.CDLL(None).mallinfo2
in_use.restype = Heap
CALLS = 2000


def kept(call):
    for _ in range(100):
        call()
    before = in_use().uordblks
    for _ in range(CALLS):
        call()
    return round((in_use().uordblks - before) / CALLS)


number = kept(lambda: torch.ops.strings.of_int(9))
text = kept(lambda: torch.ops.strings.of_str("a word"))
print("int argument: bytes kept by a call:", number)
print("str argument: bytes kept by a call:", text)
sys.exit(0 if number == 0 and text >= 32 else "the behaviour has changed")
PYTHON
