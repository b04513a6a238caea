"""Evaluation of language models, alone and against a teacher."""
