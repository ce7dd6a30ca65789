"""OpenVINO on the CPU: compiles model.onnx once, and keeps its keys and values in states of the compiled model."""
