"""Training on text with transformers' Trainer: packing, finetuning by peft's adapters or as a whole, from scratch."""
