"""The embedded demo: a small model, eight experts, and the script that trains them.

Start with `run.py`.

May import: training, routing, methods, experts, models, files, ops, native.
"""
