"""Draw pictures with a Stable Diffusion v1.x model.

    python sample.py --model M --prompt "a cat"
    python sample.py --model M --adapter text-inversion-model --prompt "a photo of a <cat>" --num_images 4

M is a folder in the diffusers layout, a .safetensors or .ckpt file, or a hub id.
"""

import sys
from pathlib import Path

from minisd import cli


def output_paths(output: Path, seeds: list[int]) -> list[Path]:
    """Where each picture goes: the file itself, or numbered names that are still free in the folder."""
    if output.suffix.lower() == ".png":
        return (
            [output]
            if len(seeds) == 1
            else [output.with_stem(f"{output.stem}-{i}") for i in range(len(seeds))]
        )
    taken = [int(p.name[:5]) for p in output.glob("*.png") if p.name[:5].isdigit()]
    first = max(taken, default=-1) + 1
    return [output / f"{first + i:05}-seed-{seed}.png" for i, seed in enumerate(seeds)]


def main() -> int:
    options = cli.parse_sample(sys.argv[1:])
    prompts = options.prompt
    if options.prompt_file:
        try:
            lines = options.prompt_file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as e:
            raise ValueError(f"--prompt_file {options.prompt_file}: {e}") from None
        prompts = [line.strip() for line in lines if line.strip()]

    import torch
    from tqdm import tqdm

    from minisd import ops
    from minisd.data import images
    from minisd.generate import Settings, infotext, pictures
    from minisd.inputs import Inputs
    from minisd.stable_diffusion import StableDiffusion

    inputs = Inputs(options)
    prompts = [prompt for prompt in inputs.prompts(prompts) for _ in range(options.num_images)]
    ops.choose(options.kernels)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}.get(options.dtype)
    sd = StableDiffusion.load(
        options.model,
        device=device,
        dtype=dtype or (torch.float16 if device.startswith("cuda") else torch.float32),
        revision=options.revision,
        variant=options.variant,
        ema=options.load_ema,
        tokenizer=options.tokenizer_name,
        cache_dir=options.cache_dir,
    )
    for adapter in options.adapter:
        for line in sd.attach(*cli.split_scale(adapter)):
            print(f"{adapter}: {line}")

    settings = Settings(
        **inputs.settings(sd),
        negative_prompt=options.negative_prompt,
        scheduler=options.scheduler,
        steps=options.steps,
        guidance_scale=options.guidance_scale,
        eta=options.eta,
        karras=options.karras,
    )
    shown = inputs.tensors(sd, settings, len(prompts))
    seeds = [options.seed + i for i in range(len(prompts))]
    paths = output_paths(options.output, seeds)
    drawn = []
    steps = len(prompts) * (settings.steps - settings.first_step)
    with tqdm(total=steps, desc="drawing", unit="step", dynamic_ncols=True) as bar:
        made = pictures(
            sd, prompts, seeds, settings, batch_size=options.batch_size, on_step=bar.update, **shown
        )
        for prompt, seed, path, image in zip(prompts, seeds, paths, made, strict=True):
            images.save_png(image, path, infotext(sd, prompt, seed, settings))
            drawn.append(image)
    if len(drawn) > 1:
        sheet = (
            options.output
            if options.output.suffix.lower() == ".png"
            else paths[0].with_name(f"{paths[0].name[:5]}-grid.png")
        )
        images.save_png(images.grid(drawn), sheet)
        paths.append(sheet)
    print("\n".join(map(str, paths)))
    return 0


if __name__ == "__main__":
    cli.run("sample.py", main)
