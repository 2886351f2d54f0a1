"""Prompts, D_CAI, preferences, and how they become batches."""
