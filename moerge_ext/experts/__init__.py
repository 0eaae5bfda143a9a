"""From folders, hub ids and live PEFT models to a checked ExpertBank.

`bank.py` has `load_experts` and `ExpertBank`, `sources.py` what any format must offer, `stacks.py` copies,
`formats/` one file per adapter format, `convert.py` writes any of them as PEFT's, `gates.py` the file of gates beside
an adapter,
`gate_files.py` gates that lie elsewhere, `fingerprint.py` whose they are, `catalogue.py` the list of a pool,
`selection.py` what is taken and under which names, `claims.py` what an adapter says of its base. Start with `bank.py`.

May import: models, files.
"""
