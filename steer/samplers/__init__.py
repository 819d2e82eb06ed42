"""Samplers of a distribution, one file for each paper."""
