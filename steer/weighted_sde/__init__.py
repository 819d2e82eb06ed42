"""Weighted SDEs: what `steer.fkc` and `steer.driftlite` run."""
