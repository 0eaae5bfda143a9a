"""Scores of routing methods on tasks, and what their routers did.

Start with `evaluate.py`; `tasks.py` reads tasks, `metrics.py` scores answers, `inspect.py` measures routing,
`explain.py` tells it token by token.

May import: training, queries, routing, methods, experts, models, files, ops, native.
"""
