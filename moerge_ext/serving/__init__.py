"""Routed models inside a serving engine: many requests, packed into one stream of tokens, on one process or many.

`settings.py` has what a server is told, start there; `pool.py` makes plans for the engine's model of them, before any
weights are there; `slices.py` says which rows and columns of a layer a rank holds, `branch.py` adds the experts to
packed tokens, alone or with other ranks, `requests.py` reads what a request says of its routing, `queries.py` finds
its affinities for a text and `tables.py` holds it for the tokens of a step. `live.py` changes the experts of a running
server; `watching.py` keeps what a step chooses, for `counts.py` and `traces.py`. None of these knows an engine: `vllm/`
puts them into vLLM, as its plugin.
`transformers/` serves a patched model by transformers' own server, by the same settings.

May import: queries, routing, methods, experts, models, files, ops, native.
"""
