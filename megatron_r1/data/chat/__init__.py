"""Conversations: read from files, rendered by a chat template, tokenised with loss masks, packed."""
