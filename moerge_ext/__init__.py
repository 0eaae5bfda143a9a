"""Route among independently trained LoRA experts, per token and per linear layer."""

import sys

from ._version import __version__


def _bare() -> bool:
    """True in `moerge doctor`, which must speak when nothing else can be imported, and in `moerge --help`."""
    words = sys.orig_argv  # while `python -m` looks for its module, sys.argv does not say which
    ours = words[words.index("-m") + 1 :][:1] == ["moerge_ext"] if "-m" in words else sys.argv[0].endswith("/moerge")
    return ours and sys.argv[1:2] in ([], ["doctor"], ["--help"], ["-h"], ["--version"])


if not _bare():
    import torch  # noqa: F401  (first: the compiled ops are loaded into it)

    from . import ops
    from .ensemble.co_llm import CoLLM
    from .ensemble.mixture import PromptEnsemble
    from .ensemble.pool import ModelPool, PoolModel
    from .ensemble.prompts import PromptExpert
    from .ensemble.router import PromptRouter
    from .ensemble.train import train_router
    from .ensemble.weighed import WeighedExperts
    from .evaluation.explain import TokenRouting, explain_tokens
    from .experts.bank import ExpertBank, ModuleBank, load_experts
    from .experts.routers import Routers, read_routers
    from .exporting.merge import merge_experts
    from .exporting.mix import mix_models
    from .exporting.push import push_expert
    from .methods import METHODS, get_method
    from .models.composition import compose_models
    from .models.prompt import PromptFormat
    from .native.loading import build_info
    from .ops import reference
    from .queries.calibration import calibrate_threshold
    from .queries.describe import describe
    from .queries.embedder import Embedder
    from .queries.example_router import ExampleRouter
    from .queries.index import index_examples
    from .queries.judged import Judged
    from .queries.likelihood import LikelihoodRouter
    from .queries.load_text_router import load_text_router
    from .queries.router import AskRouter, QueryRouter
    from .queries.similar import similar_examples
    from .queries.writer import InstructionWriter
    from .routing.patch import Handle, get_handle, patch
    from .routing.routed_linear import RoutedLinear
    from .routing.trace import Trace
    from .training.activation import average_activation
    from .training.composition import train_calm
    from .training.experts import new_expert, train_expert
    from .training.gates import train_gates
    from .training.lorahub import lorahub
    from .training.mixture import train_mix
    from .training.routers.train import train_routers

__all__ = [
    "METHODS",
    "AskRouter",
    "CoLLM",
    "Embedder",
    "ExampleRouter",
    "ExpertBank",
    "Handle",
    "InstructionWriter",
    "Judged",
    "LikelihoodRouter",
    "ModelPool",
    "ModuleBank",
    "PoolModel",
    "PromptEnsemble",
    "PromptExpert",
    "PromptFormat",
    "PromptRouter",
    "QueryRouter",
    "RoutedLinear",
    "Routers",
    "TokenRouting",
    "Trace",
    "WeighedExperts",
    "__version__",
    "average_activation",
    "build_info",
    "calibrate_threshold",
    "compose_models",
    "describe",
    "explain_tokens",
    "get_handle",
    "get_method",
    "index_examples",
    "load_experts",
    "load_text_router",
    "lorahub",
    "merge_experts",
    "mix_models",
    "new_expert",
    "ops",
    "patch",
    "push_expert",
    "read_routers",
    "reference",
    "similar_examples",
    "train_calm",
    "train_expert",
    "train_gates",
    "train_mix",
    "train_router",
    "train_routers",
]
