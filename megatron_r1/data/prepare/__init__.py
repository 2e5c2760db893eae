"""From text on disk to tokenised shards: what happens once, before any training."""
