"""The compiled parts: where they are, and whether they fit.

`loading.py` finds `_C` (build facts) and `_kernels` (the ops) and loads them; `health.py` is what `moerge doctor`
says of them. Nothing here imports the ops, so that it can speak when they cannot be loaded.

May import: nothing of this package.
"""
