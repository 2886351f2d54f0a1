"""Supervised fine-tuning: losses, optimizer, train step, loop, log and checkpoints."""
