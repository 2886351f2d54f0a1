"""Critique–revision chains and the job that samples them into D_CAI."""
