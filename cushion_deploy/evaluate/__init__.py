"""Measure quality: perplexity on real text, for any way to run the model."""
