"""A model with experts in place: `patch()`, the handle, and the layer that does the work.

`patch.py` puts a `RoutedLinear` (`routed_linear.py`) in the place of every layer that the experts name. Start there.
The layer: `layers.py` says what counts as a linear layer, `fitting.py` which layer each module of the experts is
(`naming.py`, `tables.py`), `planning.py` what a method makes of them, `absent.py` and `provenance.py` what may not be
meant, `stand_in.py` keeps the layer's names in the model, `ways.py` decides how it is computed; `fused_experts.py` and
`routed_experts.py` are for the experts of a mixture, `weighed_linear.py` for routers that no option of the ops is,
`routed_branches.py` for experts that are no LoRA, `tensor_parallel.py` and `shared_linear.py` for ranks that share a
model; `changes.py` adds and drops experts, in the spare `slots.py`. The
request: `state.py` holds what the handle's blocks set, `threads.py` carries it into threads begun inside, `repeated.py`
into what gradient checkpointing repeats, `rows.py` says which row a token belongs to, `generation.py` stands before
`generate`, `growing.py` follows text that gets longer, `trace.py` says what the router did, `row_trace.py` for each
sequence, and `tokens.py` which tokens count. What keeps a branch from counting is refused before anything is touched
(`refusals.py`, with `callers.py` on how a model's code uses its layers and `peft_layers.py` on adapters that are there
already), or named after the first forward (`ran.py`).

May import: ops, methods, experts, models, files, native.
"""
