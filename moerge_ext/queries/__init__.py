"""From the text of a query to the affinity of its sequence to every expert.

Embedders and instruction writers make vectors; described and indexed experts are what they are compared with; the
routers behind `handle.queries` are in `router.py` and `example_router.py`. Start with `router.py`.

May import: methods, experts, models, files.
"""
