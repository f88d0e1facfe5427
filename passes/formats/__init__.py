"""Weight formats: for each the ONNX function that is its specification, and how it is put into a graph."""
