"""Constitutional AI's supervised phase in JAX and Flax."""
