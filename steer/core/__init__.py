"""What every run is made of: trajectory, objective, log-weights, resampling, starts, chains, diagnostics."""
