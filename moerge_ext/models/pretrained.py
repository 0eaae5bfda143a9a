"""Base models and tokenizers for the commands, from folders or the hub."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..files.gguffile import read_gguf
from ..files.hub import beside, model_options, not_there, only_cached
from ..files.rows import parse_json
from .stored import COMPOSITION, MODEL_CONFIG

GGUF = ".gguf"
ADAPTER_CONFIG = "adapter_config.json"
HEADS = {  # PEFT's task_type: the class whose module paths its adapters have; those of text are `load_model`'s
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
PROBED_LABELS = 7919  # no size of a layer
NO_SUCH_FILE = "does not appear to have a file"  # transformers of a repository that is there
# transformers' model classes take seconds to import, and `moerge --help` needs none: imported in the functions


def usable_device(name: str) -> torch.device:
    """The device called `name` ("cpu", "cuda:0"), or a ValueError when it cannot be computed on here."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device, dtype=torch.float32).cpu()
    except (RuntimeError, AssertionError, ImportError) as error:  # all of these, by the kind of device
        there = ", ".join(["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))])
        reason = str(error).partition("\n")[0].partition(". ")[0]  # the rest can be a page
        raise ValueError(
            f"device '{name}' cannot be used here ({reason}); expected a device such as {there}"
        ) from error
    return device


def location(path: str) -> tuple[str, dict[str, Any]]:
    """(path, further arguments) of transformers' `from_pretrained` for a folder, hub id or GGUF file; where the hub
    cannot be reached, its cache is asked alone.

    ImportError, with how to install it, when a GGUF file is given and the gguf package is not there; ValueError for an
    adapter or another file in place of a model, and for a path that is not there and no hub id.
    """
    file, options = Path(path), model_options(path)
    if (file / ADAPTER_CONFIG).is_file() and not (file / MODEL_CONFIG).is_file():
        raise ValueError(_swapped(path, file / ADAPTER_CONFIG))
    if not file.is_file():
        return path, options
    if file.suffix != GGUF:
        raise ValueError(f"{path!r} is a file: pass the folder of a model, a {GGUF} file or a hub id")
    if _is_adapter(file):
        raise ValueError(_swapped(path))
    if find_spec("gguf") is None:
        raise ImportError(f"{path!r} is a GGUF file: transformers reads it with gguf, pip install 'moerge_ext[gguf]'")
    return str(file.parent), {"gguf_file": file.name}


def _swapped(path: str, config: Path | None = None) -> str:
    """What to say of an adapter in place of a model; `config` is its adapter_config.json."""
    try:
        base = parse_json(config.read_text(encoding="utf-8"))["base_model_name_or_path"] if config else None
    except (OSError, ValueError, KeyError, TypeError):  # whoever loads it as an expert says what is wrong with it
        base = None
    made = f", made for {base!r}" if isinstance(base, str) and base else ""
    return f"{path!r} is an adapter{made}, not a model: it belongs to the experts. Were model and adapter swapped?"


def _swapped_on_hub(path: str) -> str | None:
    """The same for a hub id, once no model was found there."""
    from transformers.utils.peft_utils import find_adapter_config_file

    try:
        found = None if Path(path).exists() else find_adapter_config_file(path, **only_cached())
    except (OSError, ValueError):
        return None
    return None if found is None else _swapped(path, Path(found))


def _is_adapter(file: Path) -> bool:
    try:
        return read_gguf(file).values.get("general.type") == "adapter"
    except (ValueError, OSError):  # transformers says what is wrong with it
        return False


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a model folder, GGUF file or hub id; ValueError when there is none."""
    from transformers import AutoTokenizer

    _know_compositions(path)
    where, options = location(path)
    with named(path, "tokenizer"):
        try:
            return AutoTokenizer.from_pretrained(where, **options)
        except ImportError as error:
            # where there is no protobuf, transformers 5.0 asks for it in place of whatever went wrong
            if isinstance(error.__context__, (OSError, ValueError)):
                raise error.__context__ from None
            raise


def _no_text_model(path: str) -> str | None:
    """Why a command cannot use a model of speech, images, or text beside these; None for a text model, or no model."""
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    where, options = location(path)
    try:
        config = AutoConfig.from_pretrained(where, **options)
    except (OSError, ValueError):
        return None
    auto = AutoModelForSeq2SeqLM if is_seq2seq(config) else AutoModelForCausalLM
    of_transformers = isinstance(config, transformers.PretrainedConfig) and not hasattr(config, "auto_map")
    if not of_transformers or type(config) in auto._model_mapping:
        return None
    name = (config.architectures or [type(config).__name__])[0]
    reads = getattr(getattr(transformers, name, None), "main_input_name", "input_ids")
    what = "is more than a text model" if reads == "input_ids" else f"reads {reads}, not text"
    return (
        f"{path!r} is a {name}, which {what}: the commands read text and load text models. From Python it works with "
        "batches made by its own processor: moerge_ext.train_expert(model, batches, folder), "
        "moerge_ext.train_gates(model, folder, batches), moerge_ext.patch(model, experts)"
    )


def _has_config(path: str) -> bool:
    """Whether there is a model at all."""
    from transformers import AutoConfig

    where, options = location(path)
    try:
        AutoConfig.from_pretrained(where, **options)
    except (OSError, ValueError):
        return False
    return True


def load_model(path: str, *, dtype: str, device: str | torch.device) -> Any:
    """The model (causal or encoder-decoder) of a folder, GGUF file or hub id, in eval mode.

    dtype: "auto" (as stored; a GGUF file as float32), "float32", "bfloat16" or "float16". Errors: ValueError when there
    is no such model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    _know_compositions(path)
    where, options = location(path)
    with named(path, "model"):
        config = AutoConfig.from_pretrained(where, **options)
        auto = AutoModelForSeq2SeqLM if is_seq2seq(config) else AutoModelForCausalLM
        return auto.from_pretrained(where, dtype=dtype, **options).eval().to(device)


def load_adapted(path: str, task: str | None, whole: Mapping[str, torch.Size]) -> tuple[Any, set[str]]:
    """(the model of a folder or hub id as PEFT's adapters of `task` have it (task_type; None where none is noted), on
    the CPU; its parameters that the folder does not hold, and that are random numbers).

    whole: {parameter: shape} of the modules that the adapter brings whole, of which a classifier's says how many labels
    it has; where the folder has another number, or no such head, its head is a fresh one. ValueError as `load_model`.
    """
    import transformers
    from transformers.utils.logging import get_verbosity, set_verbosity, set_verbosity_error

    config = load_config(path)
    kind = getattr(transformers, HEADS.get(task or "", ""), None)
    if kind is None and task is None and whole:  # the class that the folder names
        kind = getattr(transformers, (config.architectures or [""])[0], None)
    if kind is None:
        return load_model(path, dtype="auto", device="cpu"), set()
    where, options = location(path)
    make = getattr(kind, "from_config", None) or kind._from_config
    with named(path, "model"):
        probe = copy.deepcopy(config)
        probe.num_labels = PROBED_LABELS
        with torch.device("meta"):
            shapes = {name: p.shape for name, p in make(probe).named_parameters()}
        labels = [whole[name][0] for name, shape in shapes.items() if name in whole and shape[0] == PROBED_LABELS]
        if labels and labels[0] != config.num_labels:
            config.num_labels = labels[0]
        before = get_verbosity()
        set_verbosity_error()  # that the head is fresh: the adapter brings its own
        try:
            options |= {"dtype": "auto", "ignore_mismatched_sizes": bool(labels), "output_loading_info": True}
            model, found = kind.from_pretrained(where, config=config, **options)
        finally:
            set_verbosity(before)
    fresh = {*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])}
    return model.eval(), fresh


def load_config(path: str) -> Any:
    """The config of a model folder, GGUF file or hub id; ValueError when there is none."""
    from transformers import AutoConfig

    _know_compositions(path)
    where, options = location(path)
    with named(path, "model"):
        return AutoConfig.from_pretrained(where, **options)


def _know_compositions(path: str) -> None:
    """Lets transformers' Auto classes read the folder of a composition (`calm.py`), where `path` may be one."""
    file = Path(path) / MODEL_CONFIG
    if Path(path).exists() and not (file.is_file() and COMPOSITION.encode() in file.read_bytes()):
        return
    from .calm import register

    register()


@contextmanager
def named(path: str, what: str) -> Iterator[None]:
    """transformers' errors, of which some do not say what was looked for, as one that does."""
    try:
        yield
    except (OSError, ValueError) as error:
        if (other := _no_text_model(path)) is not None:
            raise ValueError(other) from error
        if NO_SUCH_FILE in str(error) and (swapped := _swapped_on_hub(path)) is not None:
            raise ValueError(swapped) from error
        reason = str(error).strip().partition("\n")[0]
        if Path(path).is_dir():
            raise ValueError(f"folder {path!r} holds no {what} that transformers can load ({reason})") from error
        if Path(path).is_file():
            raise ValueError(f"GGUF file {path!r} holds no {what} that transformers can load ({reason})") from error
        missing = "model" if what == "tokenizer" and not _has_config(path) else what
        here = f"there is no local folder of that name{beside(path)}"
        raise ValueError(f"{missing} {path!r} was not found: {here}, and {not_there(missing, reason)}") from error


def is_seq2seq(config: Any) -> bool:
    """Whether a transformers config is that of an encoder-decoder."""
    return bool(getattr(config, "is_encoder_decoder", False))


def context_of(config: Any) -> int | None:
    """Positions that a model has, None where its config names none (T5, Mamba)."""
    for part in (config, getattr(config, "text_config", None)):
        context = getattr(part, "max_position_embeddings", None)
        if isinstance(context, int) and context > 0:
            return context
    return None


def open_ids(tokenizer: Any, text: str, ends: Sequence[int]) -> list[int]:
    """Token ids of a text to be continued: without the end that some tokenizers add, but with one that is its own."""
    ids = one_start(tokenizer(text).input_ids, tokenizer)
    ends = (*ends, getattr(tokenizer, "eos_token_id", None))
    if not ids or ids[-1] not in ends:
        return ids
    own = tokenizer(text, add_special_tokens=False).input_ids
    added = _ends_of(ids, ends) > _ends_of(own, ends)
    return ids[:-1] if added and len(ids) > 1 else ids


def one_start(ids: list[int], tokenizer: Any) -> list[int]:
    """Token ids without the start that a tokenizer adds to a text which begins with it."""
    start = getattr(tokenizer, "bos_token_id", None)
    return ids[1:] if start is not None and ids[:2] == [start, start] else ids


def _ends_of(ids: list[int], ends: Sequence[int]) -> int:
    """How many of `ends` stand at the end."""
    return next((i for i, token in enumerate(reversed(ids)) if token not in ends), len(ids))
