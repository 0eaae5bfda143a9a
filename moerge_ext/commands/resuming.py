"""--resume of a run with other settings, refused before a model is read."""

from __future__ import annotations

import warnings
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files.kept import check_replaced

if TYPE_CHECKING:
    from .training_options import Training


def check_resumed(
    what: Training,
    default: dict[str, Any],
    state: Path,
    record: Path,
    *,
    never: Path | None = None,
    text: bool = True,
    **more: Any,
) -> None:
    """ValueError where --resume finds the state of another run, or a result of one, by what the arguments say of it.

    default: of the training's arguments; state, record: the file of an unfinished run, and what a finished one writes;
    never: the file of a finished run that nothing replaces; text: whether the rows are put as --model's tokenizer and
    config say; more: settings of this training alone. What only the model tells is compared once that is read.
    """
    from ..training.options import DECIDING
    from ..training.record import differences, read_record
    from ..training.state import other_run, stored_settings

    args = what.args
    if not getattr(args, "resume", False) or not what.ranks.first:
        return
    begun = stored_settings(state)
    saved = begun if begun is not None or state.is_file() else (read_record(record) or {}).get("settings")
    if saved is None:
        return
    here = {name: what.training.get(name, default.get(name)) for name in DECIDING}
    here |= {"validation": "validation" in what.training, "batch_size": args.batch_size, **more}
    if what.rows is not None:
        here["examples"] = len(what.rows)
    here = {name: value for name, value in here.items() if name in saved and value is not None}
    problems = differences({name: saved[name] for name in here}, here)
    if not problems and text and what.rows is not None and saved.get("data") is not None:
        digest = _digest(what)
        problems = differences({"data": saved["data"]}, {"data": digest}) if digest is not None else []
    if problems and begun is not None:
        raise ValueError(other_run(state, problems))
    if problems:
        overwrite = getattr(args, "overwrite", False) if never is None else None
        check_replaced(never or record, f"of other settings ({'; '.join(problems)})", overwrite=overwrite)


def _digest(what: Training) -> str | None:
    """By what a run knows its rows again; None where that takes the model. What is warned of is so again in the run."""
    from transformers import GenerationConfig

    from ..models.linear import skeleton_to_train
    from ..models.pretrained import load_tokenizer, location
    from ..training.encoding import prepare

    args = what.args
    where, options = location(args.model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer, model = load_tokenizer(args.model), skeleton_to_train(args.model)
        if model is None:
            return None
        with suppress(OSError):  # for want of its own, the model has one that was made of its config
            model.generation_config = GenerationConfig.from_pretrained(where, **options)
        given = {"tokenizer": tokenizer, "max_length": args.max_length, "prompt": what.prompt, "collate_fn": None}
        return prepare(model, what.rows, what.training.get("validation"), **given).digest
