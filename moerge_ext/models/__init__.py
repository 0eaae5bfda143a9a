"""Base models and tokenizers from folders and hub ids, and prompts as token ids.

Start with `pretrained.py`.

May import: files.
"""
