"""What transformers' server cannot serve, said before any weights are read."""

from __future__ import annotations

from typing import Any

from ...experts.bank import ExpertBank
from ...methods import get_method
from ...models.pretrained import GGUF, context_of, is_seq2seq, load_config
from ...routing.patch import check_patch
from ...routing.planning import listing
from ..pool import CANNOT, meta_model, of_base
from ..queries import Queries, readers
from ..settings import Settings

INSTEAD = "`--engine vllm` has it"


def checked(settings: Settings, model: str) -> tuple[ExpertBank, Any, Queries | None]:
    """(the experts, the model's config, what embeds prompts).

    ValueError that lists everything that keeps them from being served.
    """
    cannot = CANNOT.format(settings.method)
    if problems := unserved(settings) + unreadable(model):
        raise ValueError(listing(cannot, problems))
    config = load_config(model)
    if problems := unanswering(config):
        raise ValueError(listing(cannot, problems))
    experts = settings.load(model)
    if problems := of_base(experts, settings.method):
        raise ValueError(listing(cannot, problems))
    kept = {"absent": settings.absent, "missing": settings.missing, "loaded": False}
    check_patch(meta_model(config), experts, settings.method, **kept, **settings.options)
    return experts, config, settings.queries(model)


def unserved(settings: Settings) -> list[str]:
    """What is asked for that this server has no place for."""
    row = get_method(settings.method)
    problems = []
    if row.decodes:
        problems.append(f"method '{row.name}' decodes with several models: `moerge generate` runs it")
    elif row.bias is not None and (settings.embedder is None or not readers([row.name])):
        finds = ", with --embedder they are found for the prompt's text" if readers([row.name]) else ""
        problems.append(
            f"method '{row.name}' needs weights or affinities of each request, which transformers' server does not let "
            f"through: `--engine vllm` takes them{finds}, or choose a method that routes by the tokens alone, such as "
            "phatgoose"
        )
    if "every" in row.options:
        problems.append(f"method '{row.name}' reads the text again as it grows, which a server does not do")
    asked = {
        "--methods": (settings.methods, "a request cannot name a method"),
        "--live-experts": (settings.spare, "experts cannot join while it runs"),
        "--routing-metrics": (settings.metrics, "there is no /metrics to add to"),
        "--traces": (settings.traces, "requests cannot ask for a trace"),
    }
    return problems + [
        f"{flag}: {why} with transformers' server: {INSTEAD}" for flag, (said, why) in asked.items() if said
    ]


def unreadable(model: str) -> list[str]:
    """Why transformers' server would not find the model by what it is called."""
    if "@" in model:
        return [
            f"{model!r}: transformers' server takes what follows an @ for a revision: rename the folder, or link to it"
        ]
    if model.endswith(GGUF):
        return [f"{model!r} is a GGUF file, which this command does not serve: save the model as a folder"]
    return []


def unanswering(config: Any) -> list[str]:
    """Why transformers' server would not answer with a model of this kind."""
    import transformers

    if is_seq2seq(config):
        return [f"{config.model_type} is an encoder-decoder: transformers' server answers with decoders alone"]
    name = (getattr(config, "architectures", None) or [""])[0]
    if not hasattr(transformers, name or " "):
        return [f"its config names the architecture {name!r}, which transformers does not have"]
    return []


def context(config: Any) -> int:
    """Tokens of the longest request."""
    return context_of(config) or 8192
