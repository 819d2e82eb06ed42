"""Rewards of the objects in an image: detectors, GenEval, counts, layouts and colors."""
