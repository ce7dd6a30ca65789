"""The model in torch: load it, bind its Sites, run it behind a prefix, simulate quantization."""
