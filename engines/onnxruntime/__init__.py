"""ONNX Runtime: the default engine on the CPU, and its GPU execution providers."""
