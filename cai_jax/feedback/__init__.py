"""The critique–revision chain, and the dataset and preferences that come of it."""
