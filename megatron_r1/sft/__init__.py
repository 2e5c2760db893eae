"""Supervised fine-tuning, and learning from a teacher."""
