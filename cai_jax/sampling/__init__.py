"""Jitted sampling: the engine that drives chains of turns over slots, and its journal."""
