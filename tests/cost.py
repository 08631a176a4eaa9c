"""What minisd costs beside diffusers, in one run on this machine.

    python tests/cost.py                    SD v1.5's shapes with random weights; 10 GB of disk
    python tests/cost.py --model FOLDER     a model of one's own, in the diffusers layout

Every measurement runs in a process of its own, the two tools in turns, and the table shows medians. `load` is
done when every weight has been read once, so that mapping a file without reading it gains nothing.
"""

import argparse
import gc
import importlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# What loading imports, so that it is not counted as loading.
IMPORTS = {
    "minisd": ("minisd.stable_diffusion.StableDiffusion", "transformers.CLIPTokenizer"),
    "diffusers": (
        "diffusers.StableDiffusionPipeline", "diffusers.AutoencoderKL", "diffusers.UNet2DConditionModel",
        "diffusers.PNDMScheduler", "transformers.CLIPTextModel", "transformers.CLIPTokenizer",
    ),
}  # fmt: skip

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def rss() -> float:
    """Memory of this process now, in GB."""
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def touch(*modules) -> None:
    for module in modules:
        for p in module.parameters():
            p.view(-1)[:: 1024 // p.element_size()].sum()  # one value of each 1 KB: every page


def load_ours(model: str, single: bool):
    from minisd.stable_diffusion import StableDiffusion

    sd = StableDiffusion.load(f"{model}.safetensors" if single else model)
    return sd.unet, sd.vae, sd.text_encoder, sd


def load_theirs(model: str, single: bool):
    import torch
    from diffusers import StableDiffusionPipeline as Pipeline

    options = {"safety_checker": None, "torch_dtype": torch.float32}
    if single:
        pipe = Pipeline.from_single_file(
            f"{model}.safetensors", config=model, local_files_only=True, **options
        )
    else:
        pipe = Pipeline.from_pretrained(model, **options)
    return pipe.unet, pipe.vae, pipe.text_encoder, pipe


def measure_load(tool: str, model: str, single: bool = False) -> dict:
    begun = time.perf_counter()
    for name in IMPORTS[tool]:
        module, _, attribute = name.rpartition(".")
        getattr(importlib.import_module(module), attribute)
    imported, before = time.perf_counter() - begun, rss()
    begun = time.perf_counter()
    *modules, _ = (load_ours if tool == "minisd" else load_theirs)(model, single)
    touch(*modules)
    return {"import s": imported, "load s": time.perf_counter() - begun, "load peak GB": peak() - before}


def measure_load_single(tool: str, model: str) -> dict:
    return {f"single file {k}": v for k, v in measure_load(tool, model, True).items() if k != "import s"}


def measure_unet(tool: str, model: str, side: int = 64, repeats: int = 3) -> dict:
    import torch

    unet, *_ = (load_ours if tool == "minisd" else load_theirs)(model, False)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, side, side, generator=generator)
    context = torch.randn(1, 77, text_width(unet), generator=generator)
    times = []
    with torch.no_grad():
        for _ in range(repeats + 1):
            begun = time.perf_counter()
            unet(x, torch.tensor([500]), context)
            times.append(time.perf_counter() - begun)
    return {"unet 512x512 s": statistics.median(times[1:]), "unet peak GB": peak()}


def text_width(unet) -> int:
    return next(p for n, p in unet.named_parameters() if n.endswith("attn2.to_k.weight")).shape[1]


def measure_ti(tool: str, model: str, side: int = 256, steps: int = 4) -> dict:
    """Steps per second of textual inversion at batch 1, the pictures and prompts being alike."""
    import torch
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "cat"
        data.mkdir()
        generator = torch.Generator().manual_seed(0)
        pictures = torch.randint(0, 255, (2, side, side, 3), generator=generator, dtype=torch.uint8)
        for i, picture in enumerate(pictures):
            Image.fromarray(picture.numpy()).save(data / f"{i}.png")
        if tool == "minisd":
            rate = ti_ours(model, data, side, steps)
        else:
            rate = ti_theirs(model, data, side, steps)
    return {"textual inversion steps/s": rate, "textual inversion peak GB": peak()}


def ti_ours(model: str, data: Path, side: int, steps: int) -> float:
    from minisd import cli, loop, registry
    from minisd.run import Run

    argv = ["--method", "textual_inversion", "--model", model, "--data", str(data), "--resolution", str(side)]
    argv += ["--train_batch_size", "1", "--max_train_steps", str(steps + 1), "--report_to", "none"]
    argv += ["--output_dir", str(data / "out"), "--learning_rate", "5e-4"]
    name, options = cli.parse_train(argv)
    method = registry.load("methods", name).Method(options)
    times = []
    method.after_update = lambda step: times.append(time.perf_counter())
    method.save = lambda folder: None
    method.result = lambda: __import__("PIL.Image").Image.new("RGB", (1, 1))
    loop.train(method, Run(name, options))
    return steps / (times[-1] - times[0])


def ti_theirs(model: str, data: Path, side: int, steps: int) -> float:
    """The published script's step: encode, noise, predict, backward, AdamW over the table, restore it."""
    import numpy as np
    import torch
    import torch.nn.functional as F
    from diffusers import DDPMScheduler
    from PIL import Image

    unet, vae, text_encoder, pipe = load_theirs(model, False)
    scheduler, tokenizer = DDPMScheduler.from_config(pipe.scheduler.config), pipe.tokenizer
    tokenizer.add_tokens(["<cat>"])
    new = tokenizer.convert_tokens_to_ids("<cat>")
    text_encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for module in (vae, unet, text_encoder):
        module.requires_grad_(False)
    table = text_encoder.get_input_embeddings().weight.requires_grad_(True)
    optimizer = torch.optim.AdamW([table], lr=5e-4)
    original, keep = table.detach().clone(), torch.arange(len(table)) != new
    files, times = sorted(data.glob("*.png")), []
    for step in range(steps + 1):
        image = (
            Image.open(files[step % len(files)]).convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
        )
        pixels = torch.from_numpy(np.array(image, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
        ids = tokenizer(
            ["a photo of a <cat>"], padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        latents = vae.encode(pixels).latent_dist.sample().detach() * vae.config.scaling_factor
        noise, t = torch.randn_like(latents), torch.randint(0, 1000, (1,))
        pred = unet(scheduler.add_noise(latents, noise, t), t, text_encoder(ids)[0]).sample
        F.mse_loss(pred, noise).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            table[keep] = original[keep]
        times.append(time.perf_counter())
    return steps / (times[-1] - times[0])


TASKS = {"load": measure_load, "single": measure_load_single, "unet": measure_unet, "ti": measure_ti}
MORE_IS_BETTER = {"textual inversion steps/s"}


def make_model(folder: Path) -> None:
    """SD v1.5's shapes with random fp32 weights, as a folder and as a single file."""
    import torch

    from minisd.models import text, unet, vae
    from minisd.weights import compvis, diffusers
    from minisd.weights.checkpoint import MODULES, SD1_SCHEDULER, TOKENIZER, Checkpoint

    configs = {"unet": unet.SD15, "vae": vae.SD15, "text_encoder": text.SD15}
    torch.manual_seed(0)
    checkpoint = Checkpoint(
        **configs,
        tensors={part: MODULES[part](config).state_dict() for part, config in configs.items()},
        scheduler=SD1_SCHEDULER,
        tokenizer=TOKENIZER,
        pipeline="StableDiffusionPipeline",
    )
    diffusers.save(folder, checkpoint)
    compvis.save(folder.with_name(folder.name + ".safetensors"), checkpoint)
    del checkpoint
    gc.collect()


def run(task: str, tool: str, model: str) -> dict:
    command = [sys.executable, __file__, "--task", task, "--tool", tool, "--model", model]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    if done.returncode:
        raise SystemExit(f"{tool} {task} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="folder in the diffusers layout; without it one is made")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--task", choices=TASKS, help=argparse.SUPPRESS)
    parser.add_argument("--tool", choices=("minisd", "diffusers"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        print(json.dumps(TASKS[args.task](args.tool, args.model)))
        return
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or str(Path(folder) / "sd15")
        if not args.model:
            code = f"import cost, pathlib; cost.make_model(pathlib.Path({model!r}))"
            subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)
        size = sum(f.stat().st_size for f in Path(model).rglob("*.safetensors")) / 2**30
        import diffusers
        import torch

        versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}"
        machine = f"{torch.get_num_threads()} threads, {time.strftime('%Y-%m-%d')}"
        print(f"{versions}, {machine}; the model is {size:.2f} GB\n")
        print(
            f"| {'median of ' + str(args.rounds):34} | minisd | diffusers | ratio |\n|{'-' * 36}|---|---|---|"
        )
        for task in args.tasks:
            seen = {"minisd": [], "diffusers": []}
            for _ in range(args.rounds):
                for tool, results in seen.items():
                    results.append(run(task, tool, model))
            for name in seen["minisd"][0]:
                ours, theirs = (statistics.median(r[name] for r in seen[tool]) for tool in seen)
                ratio = ours / theirs if name in MORE_IS_BETTER else theirs / ours
                print(f"| {name:34} | {ours:.3g} | {theirs:.3g} | {ratio:.2f} x |", flush=True)
    print("\nratio: how many times better minisd is; above 1 it is faster or smaller")


if __name__ == "__main__":
    main()
