"""Route among independently trained LoRA experts, per token and per linear layer."""

import sys

from ._version import __version__


def _diagnosing() -> bool:
    """True in `moerge doctor`, which must be able to speak when nothing else can be imported."""
    return sys.argv[0].rpartition("/")[2] in ("-m", "moerge", "__main__.py") and sys.argv[1:2] == ["doctor"]


if not _diagnosing():
    import torch  # noqa: F401  (first: the compiled ops are loaded into it)

    from . import ops, reference
    from ._native import build_info
    from .experts import ExpertBank, ModuleBank, load_experts
    from .methods import METHODS, get_method
    from .patch import Handle, RoutedLinear, get_handle, patch
    from .query.calibration import calibrate_threshold
    from .query.describe import describe
    from .query.embedder import Embedder
    from .query.router import QueryRouter
    from .query.writer import InstructionWriter
    from .trace import Trace
    from .training.activation import average_activation
    from .training.experts import train_expert
    from .training.gates import train_gates

__all__ = [
    "METHODS",
    "Embedder",
    "ExpertBank",
    "Handle",
    "InstructionWriter",
    "ModuleBank",
    "QueryRouter",
    "RoutedLinear",
    "Trace",
    "__version__",
    "average_activation",
    "build_info",
    "calibrate_threshold",
    "describe",
    "get_handle",
    "get_method",
    "load_experts",
    "ops",
    "patch",
    "reference",
    "train_expert",
    "train_gates",
]
