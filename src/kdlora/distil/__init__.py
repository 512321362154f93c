"""Distillation: losses, the teacher's logits, training."""
