"""The parts of an adapter folder, each read without trust; `moerge_ext.adapters` puts them together."""
