"""DPM-Solver++ 2M on the reverse SDE: as 2M, and every step adds new noise (arXiv 2211.01095)."""

from functools import partial

from minisd.schedulers import dpmpp_2m

A1111 = "DPM++ 2M SDE"

sample = partial(dpmpp_2m.sample, eta=1.0)
