"""The pipeline: one stage a file, and the table of stages and edges that makes a build of them."""
