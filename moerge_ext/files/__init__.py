"""Files: what others made, read without trust; what we make, written whole or not at all.

`safefile.py` reads safetensors within limits, `tensorfile.py` is one open file, `shards.py` several as one,
`gguffile.py` GGUF, `rows.py` JSON lines, `atomic.py` writes.

May import: nothing of this package.
"""
