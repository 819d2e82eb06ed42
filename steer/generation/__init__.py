"""Runs of many prompts: files of prompts, a run directory, and workers that share it."""
