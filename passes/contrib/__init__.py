"""ONNX Runtime's fused operators in place of what exporters write out: behind the walk, which needs the parts."""
