"""SGLang on a CPU: the plugin that its processes load, attention for decoding, a stub for a CUDA package."""
