"""Route among independently trained LoRA experts, per token and per linear layer."""

import torch  # noqa: F401, I001  (first: the compiled ops are loaded into it)

from . import ops, reference
from ._native import build_info
from ._version import __version__
from .activation import average_activation
from .experts import ExpertBank, ModuleBank, load_experts
from .methods import METHODS, get_method
from .patch import Handle, RoutedLinear, get_handle, patch
from .trace import Trace

__all__ = [
    "METHODS",
    "ExpertBank",
    "Handle",
    "ModuleBank",
    "RoutedLinear",
    "Trace",
    "__version__",
    "average_activation",
    "build_info",
    "get_handle",
    "get_method",
    "load_experts",
    "ops",
    "patch",
    "reference",
]
