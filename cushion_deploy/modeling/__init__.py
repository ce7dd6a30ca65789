"""The torch side of a model: load it, bind its Sites, run it behind a prefix, simulate quantization."""
