"""Euler ancestral: each Euler step goes too far down, and new noise leads up again (arXiv 2006.11239)."""

from minisd.schedulers import euler

A1111 = "Euler a"
SETTINGS = euler.SETTINGS | {"eta": 1.0}

sample = euler.sample
