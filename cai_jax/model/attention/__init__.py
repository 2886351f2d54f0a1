"""Attention: rotary positions, masks, attention over cached keys, and kernels for packed rows."""
