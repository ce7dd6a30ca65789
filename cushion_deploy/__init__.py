"""Static per-tensor INT8 for language models at the edge: search a CushionCache, calibrate, export, compile, prove."""
