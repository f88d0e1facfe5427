"""Hadamard: the channels of an activation turned in blocks, before products whose weights are turned too. It reads no
weight: one matrix serves the whole model.
"""

HADAMARD = "Hadamard"
