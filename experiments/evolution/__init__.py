"""Candidates of an architecture search: data, training, the run, and what is told of it."""
