"""What pre-training reads: token shards, packed and blended."""
