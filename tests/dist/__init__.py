"""Tests and the programs that they start as processes of their own."""
