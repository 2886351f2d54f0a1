"""The embedded default: a small world that can be checked exactly, its text and its model."""
