"""The papers' own task collections from the hub, as task folders: T0/P3, FLAN, BIG-bench Hard and Lite, question sets.

A row of `COLLECTIONS` says which tasks, where they lie and how their rows read (`layouts.py`); `fetch.py` loads them
with the library `datasets`. Start with `collections.py`.

May import: files.
"""
