"""A language model as a judge: its prompts, its replies, and how votes are counted."""
