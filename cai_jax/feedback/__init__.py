"""Feedback: prompts, the critique-revision chain, its records and the dataset D_CAI."""
