"""Models served behind an OpenAI-compatible completions API."""
