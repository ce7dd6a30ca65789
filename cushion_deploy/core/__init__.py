"""Data types shared by all stages: model, prefix, scales, graph, engine. Imports neither torch nor onnx."""
