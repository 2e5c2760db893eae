"""Rewards of responses: rules, verifiers in worker processes and a sandbox, a judge behind HTTP, and their sum."""
