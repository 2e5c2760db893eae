"""Turns text files into tokenised shards, once, before pre-training."""
