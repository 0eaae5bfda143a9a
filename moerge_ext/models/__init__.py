"""Base models and tokenizers from folders and hub ids, and prompts as token ids.

`wrappers.py` finds the model inside what is wrapped around it. Start with `pretrained.py`.

May import: files.
"""
