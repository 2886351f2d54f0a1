"""Prompts, D_CAI and preferences on disk, and the batches made from them."""
