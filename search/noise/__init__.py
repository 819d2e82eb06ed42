"""Searches over the noise that a sampler begins from and draws on its way."""
