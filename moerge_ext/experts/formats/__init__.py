"""Readers of adapter formats, one file each. A reader trusts nothing: it checks names, sizes and values first."""
