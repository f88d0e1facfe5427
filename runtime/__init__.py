"""Running compiled models with ONNX Runtime."""
