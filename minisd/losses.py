"""Per-sample losses and their weights."""

import torch
from torch import Tensor

from minisd.noise import NoiseSchedule


def mse(pred: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample, in fp32: (b, ...) -> (b,)."""
    return (pred.float() - target.float()).square().flatten(1).mean(dim=1)


def min_snr_weights(schedule: NoiseSchedule, timesteps: Tensor, gamma: float) -> Tensor:
    """The weights (b,) that give the error of x_0 a weight of min(SNR, gamma) (Hang et al. 2023, arXiv
    2303.09556)."""
    snr = schedule.snr(timesteps)
    capped = snr.clamp(max=gamma)
    if schedule.prediction_type == "sample":
        return capped
    if schedule.prediction_type == "v_prediction":
        return capped / (snr + 1)
    return torch.where(snr > 0, capped / snr, 1.0)  # 1 is the limit at SNR 0
