"""ONNX Runtime: on the CPU the embedded default, on a GPU through its providers."""
