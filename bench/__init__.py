"""Benchmarks of moerge_ext: `python bench/run.py`. Not part of the package."""
