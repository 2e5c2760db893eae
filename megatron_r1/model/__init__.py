"""The model: megatron-core's GPTModel with latent attention, sparse experts and multi-token prediction."""
