"""DPM-Solver++ 2M on the reverse SDE: 2M, with new noise at each step (arXiv 2211.01095)."""

from minisd.schedulers import dpmpp_2m

A1111 = "DPM++ 2M SDE"
SETTINGS = dpmpp_2m.SETTINGS | {"eta": 1.0}

sample = dpmpp_2m.sample
