"""Rule rewards: pure functions from strings to numbers."""
