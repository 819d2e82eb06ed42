"""Parts of particle methods: proposals, potentials, tempering, selection, MCMC moves."""
