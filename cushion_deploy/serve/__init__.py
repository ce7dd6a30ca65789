"""An OpenAI-compatible HTTP server for a bundle; `cushion-deploy serve` starts it."""
