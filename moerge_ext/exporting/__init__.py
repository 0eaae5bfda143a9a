"""A pool of experts taken elsewhere: merged into one adapter or model, or sent to the hub.

`merge.py` has `merge_experts`, `products.py` the mathematics, `full_model.py` the base with a merge in its weights,
`mix.py` whole models as the experts of one (`mixtures.py`: of which architecture), `push.py` what goes to the hub,
`card.py` the model card there. Start with `merge.py`.

May import: routing, methods, experts, models, files, ops, native.
"""
