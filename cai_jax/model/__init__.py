"""The transformer, its cache, and its weights in the Hugging Face format."""
