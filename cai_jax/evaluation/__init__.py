"""Scores of responses: every round's, M_θ's and M_aligned's."""
