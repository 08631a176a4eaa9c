"""Measures of images for the judge: what is shown, style, outline, similarity of sets, rank among many."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from minisd.data import images
from minisd.tiny.metrics import features, ground_name, ground_of
from minisd.tiny.pictures import WHITE, on, posed, turned


def rank(drawn: Sequence[Image.Image], target: Image.Image, others: Sequence[Image.Image]) -> float:
    """Count the others that are nearer to an image than the target is; return the median over the images."""
    near = torch.cdist(features(drawn), features([target, *others]))  # (n, 1 + others)
    return (near[:, 1:] < near[:, :1]).sum(dim=1).float().quantile(0.5).item()


def distance(a: Sequence[Image.Image], b: Sequence[Image.Image]) -> Tensor:
    """Return the distances between the features of a[i] and b[i], (n,)."""
    return (features(a) - features(b)).norm(dim=1)


def shapes(drawn: Sequence[Image.Image]) -> Tensor:
    """Return the edges of images without their colours, (n, 512): in each of 8x8 overlapping cells, the root
    of the strength of edges in 8 directions (histograms of oriented gradients, Dalal and Triggs 2005)."""
    pixels = torch.stack([images.to_tensor(image.convert("RGB")) for image in drawn])  # (n, 3, h, w)
    across = F.pad(pixels[..., 2:] - pixels[..., :-2], (1, 1))
    down = F.pad(pixels[..., 2:, :] - pixels[..., :-2, :], (0, 0, 1, 1))
    strength, channel = (across.square() + down.square()).sqrt().max(dim=1, keepdim=True)  # (n, 1, h, w)
    angle = torch.atan2(down.gather(1, channel), across.gather(1, channel)) / math.pi * 8  # half a turn is 8
    strength = (strength - 0.08).clamp(min=0)  # fainter steps are shading
    side, cells = pixels.shape[-1] // 8, []
    for direction in range(8):
        near = 1 - ((angle - direction + 4) % 8 - 4).abs()
        cells.append(F.avg_pool2d(strength * near.clamp(min=0), 2 * side, side, padding=side // 2))
    return torch.cat(cells, dim=1).sqrt().flatten(1)  # (n, 8 8 8)


def alike(a: Tensor, b: Tensor) -> Tensor:
    """Return how alike shapes are, from 0 to 1, (n, m); 1 needs edges at the same places and as strong."""
    return 2 * a @ b.T / (a.square().sum(dim=1)[:, None] + b.square().sum(dim=1)).clamp(min=1e-9)


class Lineup:
    """Tells whether images show a thing on a background, not another thing or a patch of its colours."""

    # The least likeness of shapes. True images, shifted and re-encoded, have 0.89 to 0.99 (a blue whale on
    # blue 0.80), what the model draws for words that it knows 0.94 to 0.98, half-learned things 0.83 to 0.87;
    # true images that a blur of 6 pixels made into patches 0.01 to 0.80.
    LIKE = 0.88
    SAME = 0.95  # others that are so like the thing itself, as a black cat is like a cat, are not compared

    def __init__(
        self, tile: Image.Image, others: Sequence[Image.Image], ground: tuple[int, int, int] = WHITE
    ):
        """`tile` and `others` have transparency."""
        moves = [posed(tile, shift=(x, y)) for x in (0, -2, 2) for y in (0, -2, 2)]
        self.ground = ground_name(on(tile, ground))
        self.own = shapes([on(moved, ground) for moved in moves])  # (9, d)
        them = shapes([on(other, ground) for other in others])
        self.others = them[alike(them, self.own).amax(dim=1) < self.SAME]
        # Colours of the thing, where each of `moves` puts it, as it is and in five other hues.
        self.colours = torch.stack(
            [features([on(turned(m, 60 * k), ground) for k in range(6)]) for m in moves]
        )  # (9, 6, d)

    def shape(self, drawn: Sequence[Image.Image]) -> Tensor:
        """Return how alike shapes are, from 0 to 1, at the best of nine shifts by up to 2 pixels, (n,)."""
        return alike(shapes(drawn), self.own).amax(dim=1)

    def recognised(self, drawn: Sequence[Image.Image]) -> Tensor:
        """Return whether each image shows the thing, (n,): its shape is alike, and more so than any other's;
        its colours are nearer to the thing than to it in another hue; its background is the right one."""
        edges = shapes(drawn)
        own, place = alike(edges, self.own).max(dim=1)  # (n,)
        other = alike(edges, self.others).amax(dim=1)
        far = (features(drawn)[:, None] - self.colours[place]).norm(dim=2)  # (n, 6)
        ground = torch.tensor([ground_name(image) == self.ground for image in drawn])
        return (own >= self.LIKE) & (own > other) & (far.argmin(dim=1) == 0) & ground


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
