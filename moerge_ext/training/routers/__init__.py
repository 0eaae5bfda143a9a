"""Routers trained over a frozen bank of experts, one file per bank.

`train.py` is the trainer of all rows with a `Method.learned`; `place.py` puts the routers that begin into the model and
says what is trained of them, `objective.py` is what is minimized.

Part of the room `training`.
"""
