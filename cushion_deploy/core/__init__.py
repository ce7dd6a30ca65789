"""The nouns that every stage shares: model, prefix, scales, graph, engine. Neither torch nor onnx."""
