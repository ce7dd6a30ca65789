"""The commands as Python functions; most of them run stages of the pipeline."""
