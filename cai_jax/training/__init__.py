"""Supervised fine-tuning on D_CAI: examples, packing, objective, step, checkpoints and loop."""
