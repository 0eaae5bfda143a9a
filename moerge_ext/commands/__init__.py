"""One file a command: its arguments and the call; what it does lives in the other rooms.

`main.py` has the table of commands, `options.py` the options that several of them share.

May import: demo, exporting, ensemble, evaluation, serving, training, queries, routing, methods, experts, models, files,
ops, native.
"""
