"""Base models and tokenizers from folders and hub ids, and prompts as token ids.

`wrappers.py` finds the model inside what is wrapped around it, `stored.py` and `weights.py` read stored weights without
a model, `calm.py` is a model made of two (`composition.py`, `cross_attention.py`). Start with `pretrained.py`.

May import: files.
"""
