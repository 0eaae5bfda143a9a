"""vLLM's plugin: `plugin.py` is what vLLM loads in every process, start there.

`worker.py` puts the experts on a worker's model after its weights are there, `layers.py` finds their layers and adds to
what these compute, `steps.py` tells the tokens of a step which request they are of, `frontend.py` reads what requests
say, `startup.py` holds that no worker serves without experts, `unsupported.py` names what does not go with them,
`launch.py` is vLLM's command line, `offline.py` asks it without a server. `endpoints.py` adds routes to its server:
`exchange.py` changes the experts of all workers, `metrics.py` shows their counts, `served.py` is what they are asked.
vLLM is imported inside of functions: this package is imported without it.
"""
