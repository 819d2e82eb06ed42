"""Watching a run by its events (`on_step=`): trackers of experiments, and a live picture of the best sample."""
