"""What several test files share."""

import pytest
import torch

from minisd.models import unet, unet2d, vae
from minisd.noise import NoiseSchedule
from minisd.schedulers._problem import InitImage, Problem, read_settings

TINY_UNET = unet.UNetConfig(
    in_channels=4,
    out_channels=4,
    block_out_channels=(32, 64, 64),
    attention=(True, True, False),
    num_heads=(2, 4, 4),
    layers_per_block=2,
    cross_attention_dim=24,
    norm_num_groups=8,
    norm_eps=1e-5,
    sample_size=16,
)
TINY_VAE = vae.VAEConfig(
    in_channels=3,
    out_channels=3,
    latent_channels=4,
    block_out_channels=(16, 32, 32),
    layers_per_block=2,
    norm_num_groups=8,
    sample_size=32,
    scaling_factor=0.5,
)
TINY_PIXELS = unet2d.UNet2DConfig(
    in_channels=3,
    out_channels=3,
    block_out_channels=(16, 32, 32),
    attention=(False, True, False),
    head_dim=8,
    layers_per_block=1,
    norm_num_groups=8,
    norm_eps=1e-5,
    sample_size=16,
)

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def full_size(test):
    """A test of networks of SD v1.x's size: slow, and never two at once (--dist loadgroup): gigabytes."""
    return pytest.mark.slow(pytest.mark.xdist_group("full size")(test))


def mostly_slow(cases, *kept) -> list:
    """The cases of a parametrized test; those that are not `kept` are slow."""
    return [c if c in kept else pytest.param(*(c if isinstance(c, tuple) else [c]), marks=pytest.mark.slow)
            for c in cases]  # fmt: skip


def same_fields(config, *names: str) -> dict:
    """The fields that a diffusers network calls as we do."""
    return {name: getattr(config, name) for name in names}


def diffusers_unet(config: unet.UNetConfig):
    """A UNet2DConditionModel with random weights."""
    diffusers = pytest.importorskip("diffusers")
    kind = {True: "CrossAttn", False: ""}
    return diffusers.UNet2DConditionModel(
        down_block_types=[f"{kind[a]}DownBlock2D" for a in config.attention],
        up_block_types=[f"{kind[a]}UpBlock2D" for a in reversed(config.attention)],
        attention_head_dim=config.num_heads,
        **same_fields(config, "in_channels", "out_channels", "block_out_channels", "layers_per_block"),
        **same_fields(config, "cross_attention_dim", "norm_num_groups", "norm_eps", "sample_size"),
    )


def same_weights(ours: torch.nn.Module, theirs: torch.nn.Module, prefix: str = "") -> None:
    """Random values everywhere, zero biases and unit norms included, then theirs into ours by name."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    state = theirs.state_dict()
    known = ours.state_dict()
    ours.load_state_dict({k if k in known else prefix + k: v for k, v in state.items()}, strict=True)


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float, floor: float = 0.0) -> None:
    error = (ours - theirs).abs().max() / max(theirs.abs().max(), floor)
    assert error <= tolerance, f"off by {error:.1e} of the scale"


def assert_same_gradients(ours: torch.nn.Module, theirs: torch.nn.Module, prefix: str = "") -> None:
    mine = dict(ours.named_parameters())
    # The bias of a key shifts all scores alike: its gradient is zero, and all there is of it is rounding.
    floor = 1e-4 * max(p.grad.abs().max() for p in theirs.parameters())
    for name, p in theirs.named_parameters():
        assert_close(mine[name if name in mine else prefix + name].grad, p.grad, 1e-4, floor)


def toy(x, t):
    """A network without weights."""
    return 0.5 * x.tanh() + 0.1 * t / 1000


def seeded(*seeds: int) -> list[torch.Generator]:
    """A generator for each seed."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def drawn(
    scheduler,
    steps: int,
    noise: torch.Tensor,
    generators: list[torch.Generator] = (),
    denoise=toy,
    *,
    schedule: NoiseSchedule | None = None,
    init_image: InitImage | None = None,
    **settings,
) -> list[torch.Tensor]:
    """x after each step of a scheduler's module, on the noise schedule of Stable Diffusion by default."""
    problem = Problem(
        denoise=denoise,
        noise=noise,
        schedule=schedule or NoiseSchedule(**SD),
        steps=steps,
        generators=generators,
        settings=read_settings(scheduler, settings),
        init_image=init_image,
    )
    return list(scheduler.sample(problem))
