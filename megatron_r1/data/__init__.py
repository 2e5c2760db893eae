"""Data: tokenizer, text preparation, pre-training shards, conversations, preferences, prompts, synthetic worlds."""
