"""Evaluation of models, simulated quantization and engines: perplexity, zero-shot tasks and speed."""
