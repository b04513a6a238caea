"""Distillation of Transformers into sub-quadratic students: teachers, recipes, stages and the training loop."""
