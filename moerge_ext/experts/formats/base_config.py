"""The base model's config, for formats that leave out of the file what it says."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ...models.pretrained import location


def base_config(base: Any) -> Mapping[str, Any]:
    """The fields of the text model's config. ValueError when there is none.

    base: a model, a config, its fields, or the folder, GGUF file or hub id of a model. Nothing but the config is read.
    """
    if isinstance(base, (str, os.PathLike)):
        from transformers import PretrainedConfig

        try:
            where, options = location(os.fspath(base))
            fields, _ = PretrainedConfig.get_config_dict(where, **options)
        except (OSError, ValueError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0][:400]
            raise ValueError(f"needs the base's config, and {os.fspath(base)!r} has none ({reason})") from None
        if not fields:
            raise ValueError(f"needs the base's config, and {os.fspath(base)!r} has none")
    else:
        config = getattr(base, "config", base)
        fields = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(fields, Mapping):
        raise ValueError(f"needs the base model, its config or its folder, got {type(base).__name__}")
    text = fields.get("text_config")
    return text if isinstance(text, Mapping) else fields
