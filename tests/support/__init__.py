"""Helpers of tests: builders, fakes, and programs that run as ranks."""
