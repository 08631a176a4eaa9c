"""Euler ancestral: Euler steps to a lower noise level, and new noise back up (arXiv 2006.11239)."""

from minisd.schedulers import euler

DIFFUSERS = "EulerAncestralDiscreteScheduler"
A1111 = "Euler a"
SETTINGS = euler.SETTINGS | {"eta": 1.0}

sample = euler.sample
