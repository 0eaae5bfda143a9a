"""PELMo: several prompts of one model as experts, a router over them, their next-token probabilities mixed.

Start with `mixture.py`; `prompts.py` makes the experts, `train.py` the router. `co_llm.py` is another way to decode
together: each token by the base or one expert.

May import: evaluation, training, queries, routing, methods, experts, models, files, ops, native.
"""
