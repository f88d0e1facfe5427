"""Where models come from: a zoo of pinned real models, export to ONNX, bundled text, tiny graphs for tests."""
