"""Language models: families, the transformer and its cache, LoRA, loading and saving."""
