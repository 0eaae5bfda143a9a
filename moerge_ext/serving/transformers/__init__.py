"""transformers' own server (`transformers serve`) with a routed model, where there is no vLLM.

`manager.py` puts the experts on the model where the server's manager of models loads it, start there; `checks.py` finds
what cannot be served before any weights are read, `cache.py` keeps its continuous batching within the memory that there
is, `launch.py` starts and stops it. The server's own packages are imported inside of functions, but for `manager.py`.
"""
