"""Runnable scripts: one frozen Args dataclass and one readable main each."""
