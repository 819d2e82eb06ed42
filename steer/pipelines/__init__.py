"""Any diffusers pipeline as a reverse process."""
