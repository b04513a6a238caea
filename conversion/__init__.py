"""Checkpoints in and out: self-contained Hub export, model cards, parity."""
