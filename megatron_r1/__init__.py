"""megatron_r1: the DeepSeek-R1 recipe on megatron-core and SGLang, from a laptop's CPU to a cluster."""

__version__ = "0.1.0"
