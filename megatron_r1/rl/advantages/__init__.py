"""Advantage estimators: group-relative, per step, GAE with a critic."""
