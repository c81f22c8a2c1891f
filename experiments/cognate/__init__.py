"""Training of the three Cognate models of phase 1."""
