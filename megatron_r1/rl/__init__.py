"""Reinforcement learning: advantages, objective, batching and the loop that joins them to rollouts."""
