"""Searches that keep the best of a population at every choice."""
