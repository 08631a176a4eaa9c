"""minisd: Stable Diffusion v1.x, small enough to read."""
