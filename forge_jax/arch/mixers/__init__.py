"""What mixes tokens: `mixer(x, frame, state) -> (y, state)`, one file each.

Without a state the tokens of x are the whole past; with one they follow what it holds. Every mixer
is causal, and one token at a time gives what all at once give.
"""
