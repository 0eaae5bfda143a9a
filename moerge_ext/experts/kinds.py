"""The kinds of gate that this package makes; a sidecar file may hold others."""

SIGMOID_GATE = "sigmoid-gate"  # trained: train_gates
AVERAGE_ACTIVATION = "average-activation"  # the module's mean input: average_activation
INSTRUCTION = "instruction-embedding"  # the embedded task instruction, under __global__: describe

PROMPT_KEY = "moerge_prompt"  # in a file's header: the prompt format that it was trained with
