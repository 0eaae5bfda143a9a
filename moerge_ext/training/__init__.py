"""Training: experts (LoRA), their gates, gates that need no training, and weights of a few examples.

Start with `gates.py`: `train_gates` is the way that the others follow. `routers/` trains routers over a bank of
experts, `mixture.py` and `composition.py` models that are made of whole ones (`whole.py`).

May import: routing, methods, experts, models, files, ops, native.
"""
