"""Conversations: read, rendered by a chat template, tokenised with what is learned of them, packed."""
