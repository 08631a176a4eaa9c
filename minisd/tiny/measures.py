"""Measures of images for the judge: style, outline, similarity of sets, rank among many."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from minisd.data import images
from minisd.tiny.metrics import features, ground_of


def rank(drawn: Sequence[Image.Image], target: Image.Image, others: Sequence[Image.Image]) -> float:
    """Count the others that are nearer to an image than the target is; return the median over the images."""
    near = torch.cdist(features(drawn), features([target, *others]))  # (n, 1 + others)
    return (near[:, 1:] < near[:, :1]).sum(dim=1).float().quantile(0.5).item()


def distance(a: Sequence[Image.Image], b: Sequence[Image.Image]) -> Tensor:
    """Return the distances between the features of a[i] and b[i], (n,)."""
    return (features(a) - features(b)).norm(dim=1)


def outline(image: Image.Image) -> Tensor:
    """Return where an image differs from its background, (h, w) of bool."""
    pixels = images.to_tensor(image)
    ground = torch.tensor(ground_of(image))[:, None, None] / 127.5 - 1
    return (pixels - ground).abs().amax(dim=0) > 0.2


def overlap(a: Tensor, b: Tensor) -> float:
    """Return the intersection over union of two outlines."""
    return ((a & b).sum() / (a | b).sum().clamp(min=1)).item()


def frechet(a: Sequence[Image.Image], b: Sequence[Image.Image]) -> float:
    """Return the squared Frechet distance of Gaussians fitted to the colours of 8x8 cells (FID: to Inception
    features)."""
    means, covariances = [], []
    for drawn in (a, b):
        pixels = torch.stack([images.to_tensor(image) for image in drawn]) / 2 + 0.5
        cells = F.adaptive_avg_pool2d(pixels, 8).flatten(1).double()  # (n, 192)
        means.append(cells.mean(dim=0))
        covariances.append(cells.T.cov())
    values, vectors = torch.linalg.eigh(covariances[0])
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = torch.linalg.eigvalsh(root @ covariances[1] @ root).clamp(min=0).sqrt().sum()
    traces = sum(c.trace() for c in covariances)
    return ((means[0] - means[1]).square().sum() + traces - 2 * product).item()


class Styles:
    """A linear classifier of styles by histograms of the steps between neighbouring pixels, of saturation and
    of brightness. Drawn images come from the model's autoencoder, so the examples should, too."""

    def __init__(self, examples: dict[str, Sequence[Image.Image]]):
        self.styles = list(examples)
        x = torch.cat([self._statistics(drawn) for drawn in examples.values()])
        counts = torch.tensor([len(drawn) for drawn in examples.values()])
        y = torch.eye(len(self.styles)).repeat_interleave(counts, dim=0)
        ridge = 1e-2 * torch.eye(x.shape[1])
        self.weight = torch.linalg.solve(x.T @ x + ridge, x.T @ y)

    def score(self, drawn: Sequence[Image.Image], style: str) -> Tensor:
        """Return scores (n,), about 1 for images of that style and about 0 for others."""
        return (self._statistics(drawn) @ self.weight)[:, self.styles.index(style)]

    def share(self, drawn: Sequence[Image.Image], style: str) -> float:
        """Return the share of images that are classified as that style."""
        best = (self._statistics(drawn) @ self.weight).argmax(dim=1)
        return (best == self.styles.index(style)).float().mean().item()

    @staticmethod
    def _statistics(drawn: Sequence[Image.Image]) -> Tensor:
        """Return the classifier's inputs, (n, 61)."""
        pixels = torch.stack([images.to_tensor(image) for image in drawn]) / 2 + 0.5  # (n, 3, h, w)
        edges = torch.tensor([0, 0.004, 0.02, 0.05, 0.1, 0.2, 0.4, 2])
        parts = []
        for step in (1, 2):
            across = (pixels[..., step:] - pixels[..., :-step]).abs().flatten(1)
            down = (pixels[..., step:, :] - pixels[..., :-step, :]).abs().flatten(1)
            parts.append(_shares(torch.cat([across, down], dim=1), edges))
        saturation = (pixels.amax(dim=1) - pixels.amin(dim=1)).flatten(1)
        for values in (saturation, pixels.mean(dim=1).flatten(1)):
            parts.append(_shares(values, torch.linspace(0, 1, 9)))
        shares = torch.cat(parts, dim=1)
        return torch.cat([shares, shares.sqrt(), torch.ones(len(shares), 1)], dim=1)


def _shares(values: Tensor, edges: Tensor) -> Tensor:
    """Return a histogram of each row, as shares between the edges, (n, bins)."""
    below = torch.stack([(values < edge).float().mean(dim=1) for edge in edges[1:-1]], dim=1)
    return torch.diff(below, dim=1, prepend=torch.zeros(len(values), 1), append=torch.ones(len(values), 1))
