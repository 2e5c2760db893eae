"""What the model reads: generated worked arithmetic, its tokenizer, its token corpus and its prompts."""
