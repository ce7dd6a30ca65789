"""Count what a plan runs in INT8: its kernels, read from the build log or the engine inspector, against the graph."""
