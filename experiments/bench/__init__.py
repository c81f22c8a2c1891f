"""Side-by-side measurements: one command each, JSON and a table out."""
