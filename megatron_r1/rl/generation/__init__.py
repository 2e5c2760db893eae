"""Rollouts: generated, scored, filtered, journalled; synchronously or ahead of training."""
