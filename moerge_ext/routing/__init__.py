"""A model with experts in place: `patch()`, the handle, and the layer that does the work.

`patch.py` puts a `RoutedLinear` (`routed_linear.py`) in the place of every layer that the experts name; `layers.py`
says what counts as a linear layer, `fitting.py` which layer each module of the experts is (`naming.py`, `tables.py`),
`absent.py` and `provenance.py` what may not be meant, `ways.py` which way a layer takes and why, `rows.py` which row of
affinities a token has, `trace.py` what the router did, `growing.py` follows text that `generate` makes longer. What
keeps a branch from counting is refused before anything is touched (`refusals.py`, with `callers.py` on how a model's
code uses its layers and `peft_layers.py` on adapters that are there already), or named after the first forward
(`ran.py`). Start with `patch.py`.

May import: ops, methods, experts, models, files, native.
"""
