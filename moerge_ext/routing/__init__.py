"""A model with experts in place: `patch()`, the handle, and the layer that does the work.

`patch.py` puts a `RoutedLinear` (`routed_linear.py`) in the place of every layer that the experts name; `layers.py`
says what counts as a linear layer, `fitting.py` which layer each module of the experts is (`naming.py`, `tables.py`),
`absent.py` and `provenance.py` what may not be meant, `trace.py` what the router did, `growing.py` follows text that
`generate` makes longer. Start with `patch.py`.

May import: ops, methods, experts, models, files, native.
"""
