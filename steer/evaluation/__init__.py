"""Methods by name, compared at equal budget, and chosen before the run."""
