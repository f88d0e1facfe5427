"""Observers: what is learnt from activations, by nodes that reduce them inside ONNX Runtime."""
