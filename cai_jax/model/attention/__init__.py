"""Attention: the softmax over cached keys, and kernels for packed rows."""
