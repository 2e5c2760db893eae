"""Generated worlds: arithmetic, reasoning-gym and the assistant tasks, and the tokenizer trained on them."""
