"""PELMo: several prompts of one model as experts, a router over them, their next-token probabilities mixed.

Start with `mixture.py`; `prompts.py` makes the experts, `train.py` the router.

May import: evaluation, training, queries, routing, methods, experts, models, files, ops, native.
"""
