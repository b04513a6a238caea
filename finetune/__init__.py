"""Finetuning with peft and transformers' Trainer: packing, adapters and their coverage, the language-model run."""
