"""Evaluation of language models and embedders: metrics, and the measurements that use them."""
