"""Euler ancestral: each Euler step goes too far down, and new noise leads up again (arXiv 2006.11239)."""

from functools import partial

from minisd.schedulers import euler

A1111 = "Euler a"

sample = partial(euler.sample, eta=1.0)
