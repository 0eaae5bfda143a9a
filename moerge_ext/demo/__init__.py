"""Two demos: a small model of our own that is embedded, and SmolLM2-135M-Instruct; their experts, and what trains them.

Start with `run.py`.

May import: evaluation, training, queries, routing, methods, experts, models, files, ops, native.
"""
