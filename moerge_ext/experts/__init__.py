"""From folders, hub ids and live PEFT models to a checked ExpertBank.

`bank.py` has `load_experts` and `ExpertBank`, `sources.py` what any format must offer, `formats/` one file per
adapter format, `gates.py` the file of gates beside an adapter. Start with `bank.py`.

May import: files.
"""
