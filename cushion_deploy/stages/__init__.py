"""The build pipeline: one file per stage, and ``pipeline.py``, which connects the stages."""
