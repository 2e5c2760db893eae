"""Data of pre-training: token shards, packed and blended."""
