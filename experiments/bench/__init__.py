"""Side-by-side measurements against other implementations; ratios come out."""
