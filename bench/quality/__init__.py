"""A first table on real text: experts of a tiny real model, all methods, held-in and held-out tasks."""
