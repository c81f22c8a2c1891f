"""The race of algorithms: when a domain is said to have reached the line."""

from experiments.bench.algorithms import crossed


def test_the_first_time_counts_and_stays():
    first = crossed([None, None, None], [0.5, 0.85, 0.9], 0.85, 128)
    assert first == [None, 128, 128]
    assert crossed(first, [0.9, 0.1, 0.99], 0.85, 256) == [256, 128, 128]
