"""TensorRT in both flavours: plans compiled, counted, checked and run."""
