"""Supervised fine-tuning, and distillation from a teacher."""
