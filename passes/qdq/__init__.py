"""Activations in 8 bits: QuantizeLinear and DequantizeLinear where an execution provider computes with the codes."""
