"""What minisd costs beside diffusers, in one run on this machine.

    python tests/cost.py                    SD v1.5's shapes with random weights; 10 GB of disk
    python tests/cost.py --model FOLDER     a model of one's own, in the diffusers layout
    python tests/cost.py --before CHECKOUT  beside another commit of minisd, checked out there, instead

Loading and drawing are measured in a process for each tool, in turns. Loading is done when every weight has
been read once, so that mapping a file without reading it gains nothing; what is drawn is the second picture
of its process, and the start is all that comes before the UNet is first called. The UNet and training are
measured in one process, a step of each tool in turns. The ratio is the median of the pairs' ratios: a machine
whose speed changes from minute to minute changes both alike.
"""

import argparse
import gc
import importlib
import json
import os
import resource
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

# What loading imports, so that it is not counted as loading.
IMPORTS = {
    "minisd": ("minisd.sampling.stable_diffusion.StableDiffusion",),
    "diffusers": (
        "diffusers.StableDiffusionPipeline", "diffusers.AutoencoderKL", "diffusers.UNet2DConditionModel",
        "diffusers.PNDMScheduler", "transformers.CLIPTextModel", "transformers.CLIPTokenizer",
    ),
}  # fmt: skip

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
TINY = str(ROOT / "minisd" / "tiny")
PROMPT = "a photo of a cat"


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
    from minisd.sampling.stable_diffusion import StableDiffusion

    sd = StableDiffusion.load(f"{model}.safetensors" if single else model)
    return sd.unet, sd.vae, sd.text_encoder, sd


def load_theirs(model: str, single: bool, dtype: str = "float32"):
    import torch
    from diffusers import StableDiffusionPipeline as Pipeline

    options = {"safety_checker": None, "torch_dtype": getattr(torch, dtype)}
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


def measure_draw(
    tool: str, model: str, *, side: int, steps: int, ours: str = "float32", theirs: str = "float32"
) -> dict:
    """A picture from its prompt by DDIM with guidance, and the memory that its process took in all."""
    dtype = ours if tool == "minisd" else theirs
    draw = (draw_ours if tool == "minisd" else draw_theirs)(model, side, steps, dtype)
    draw()
    begun = time.perf_counter()
    draw()
    about = f"{steps} steps at {side}x{side}"
    about += "" if (ours, theirs) == ("float32", "float32") else f", {ours} beside {theirs}"
    return {f"{about}, s": time.perf_counter() - begun, f"{about}, peak GB": peak()}


def draw_ours(model: str, side: int, steps: int, dtype: str) -> Callable[[], object]:
    import torch

    from minisd import cli
    from minisd.sampling.generate import Settings, pictures
    from minisd.sampling.stable_diffusion import StableDiffusion

    cli.keep_memory()  # as sample.py does
    sd = StableDiffusion.load(model, dtype=getattr(torch, dtype))
    settings = Settings(width=side, height=side, steps=steps)
    return lambda: list(pictures(sd, [PROMPT], [0], settings))


def draw_theirs(model: str, side: int, steps: int, dtype: str) -> Callable[[], object]:
    """In bf16 with its networks in channels-last, which is faster."""
    import torch
    from diffusers import DDIMScheduler

    *_, pipe = load_theirs(model, False, dtype)
    if dtype == "bfloat16":
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)

    def draw() -> object:
        generator = torch.Generator().manual_seed(0)
        return pipe(PROMPT, width=side, height=side, num_inference_steps=steps, generator=generator).images

    return draw


def measure_start(tool: str, model: str, *, side: int) -> dict:
    """From the start of the process to the first call of the UNet."""

    def stop(*args, **kwargs) -> None:
        print(json.dumps({f"start at {side}x{side}, s": time.time() - float(os.environ["COST_BEGUN"])}))
        sys.stdout.flush()
        os._exit(0)

    if tool == "minisd":
        from minisd.sampling.generate import Denoiser

        Denoiser.__call__ = stop
        flags = f"--width {side} --height {side} --steps 4 --device cpu".split()
        sys.argv = ["sample.py", "--model", model, "--prompt", PROMPT, *flags]
        runpy.run_path(str(ROOT / "sample.py"), run_name="__main__")
    else:
        *_, pipe = load_theirs(model, False)
        pipe.unet.forward = stop
        pipe(PROMPT, width=side, height=side, num_inference_steps=4)
    raise SystemExit("the UNet was not called")


def pairs(ours: Callable[[], None], theirs: Callable[[], None], count: int) -> dict[str, list[float]]:
    """Seconds of `count` calls of each, in turns, changing who goes first; one call of each before."""
    times = {"minisd": [], "diffusers": []}
    calls = [("minisd", ours), ("diffusers", theirs)]
    for i in range(count + 1):
        for name, call in calls if i % 2 else reversed(calls):
            begun = time.perf_counter()
            call()
            if i:
                times[name].append(time.perf_counter() - begun)
    return times


def measure_bf16(model: str) -> dict:
    """The networks in bf16 and channels-last: a step with guidance, and the decoding of its image; and of the
    step how much of the speed of one large product in bf16 it reaches."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    (ours, our_vae, *_), (theirs, their_vae, *_) = (
        [network.bfloat16().to(memory_format=torch.channels_last) for network in load(model, False)[:2]]
        for load in (load_ours, load_theirs)
    )
    found = {}
    with torch.no_grad():
        a = torch.randn(2048, 2048).bfloat16()
        limit = 2 * 2048**3 / min(pairs(lambda: a @ a, lambda: None, 5)["minisd"])
        for side in (32, 64):
            x = torch.randn(2, 4, side, side).bfloat16().to(memory_format=torch.channels_last)
            context, t = torch.randn(2, 77, text_width(ours)).bfloat16(), torch.tensor([500, 500])
            times = pairs(partial(ours, x, t, context), partial(theirs, x, t, context), 3)
            # As products: those of the fused attention are not counted
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                theirs(x, t, context)
            share = counter.get_total_flops() / statistics.median(times["minisd"]) / limit
            found[f"bf16 step at {8 * side}x{8 * side}, s ({share:.0%} of {limit / 1e9:.0f} GFLOP/s)"] = times
            calls = partial(our_vae.decode, x[:1]), partial(their_vae.decode, x[:1])
            found[f"bf16 decoding to {8 * side}x{8 * side}, s"] = pairs(*calls, 3)
    return found


def measure_unet(model: str, side: int = 64, count: int = 5) -> dict:
    """One forward at 512x512, batch 1."""
    import torch

    (ours, *_), (theirs, *_) = load_ours(model, False), load_theirs(model, False)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, side, side, generator=generator)
    context, t = torch.randn(1, 77, text_width(ours), generator=generator), torch.tensor([500])
    with torch.no_grad():
        times = pairs(lambda: ours(x, t, context), lambda: theirs(x, t, context), count)
    return {"unet forward at 512x512, s": times}


def text_width(unet) -> int:
    return next(p for n, p in unet.named_parameters() if n.endswith("attn2.to_k.weight")).shape[1]


def measure_ti(model: str, side: int = 256, count: int = 5) -> dict:
    """One step of textual inversion at batch 1, from the same kind of pictures and prompts."""
    import torch
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "cat"
        data.mkdir()
        generator = torch.Generator().manual_seed(0)
        pictures = torch.randint(0, 255, (2, side, side, 3), generator=generator, dtype=torch.uint8)
        for i, picture in enumerate(pictures):
            Image.fromarray(picture.numpy()).save(data / f"{i}.png")
        times = pairs(ti_ours(model, data, side), ti_theirs(model, data, side), count)
    return {f"textual inversion step at {side}x{side}, s": times}


def ti_ours(model: str, data: Path, side: int) -> Callable[[], None]:

    from minisd import cli, registry
    from minisd.data.order import Stream, batches
    from minisd.training import optim
    from minisd.training.distributed import Processes, device
    from minisd.training.latents import cache_latents

    argv = ["--method", "textual_inversion", "--model", model, "--data", str(data), "--resolution", str(side)]
    name, options = cli.parse_train([*argv, "--train_batch_size", "1", "--learning_rate", "5e-4"])
    method = registry.load_class("methods", name)(options, device())
    parameters = list(method.setup().values())
    stream = Stream(method.datasets()[0], 0)
    cache_latents(stream, method.sd.encode_images, 1, Processes())
    source = batches(stream, first=0, count=1000, batch_size=1)
    optimizer = optim.new(parameters, options)

    def step() -> None:
        method.loss(next(source)).backward()
        optimizer.step(optim.clip_divisor(optim.grad_norm(parameters), options.max_grad_norm))
        optimizer.zero_grad()

    return step


def ti_theirs(model: str, data: Path, side: int) -> Callable[[], None]:
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
    file = sorted(data.glob("*.png"))[0]

    def step() -> None:
        image = Image.open(file).convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(image, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
        prompt = ["a photo of a <cat>"]
        ids = tokenizer(prompt, padding="max_length", truncation=True, return_tensors="pt").input_ids
        latents = vae.encode(pixels).latent_dist.sample().detach() * vae.config.scaling_factor
        noise, t = torch.randn_like(latents), torch.randint(0, 1000, (1,))
        pred = unet(scheduler.add_noise(latents, noise, t), t, text_encoder(ids)[0]).sample
        F.mse_loss(pred, noise).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            table[keep] = original[keep]

    return step


ALONE = {
    "load": measure_load,
    "single": measure_load_single,
    "draw": partial(measure_draw, side=256, steps=4),
    **{  # what a CPU with bf16 draws by default, beside the default of diffusers and its best
        f"{name}_{side}": partial(measure_draw, side=side, steps=4, ours="bfloat16", theirs=theirs)
        for side in (256, 512)
        for name, theirs in (("auto", "float32"), ("bf16", "bfloat16"))
    },
    "start": partial(measure_start, side=256),
    "tiny_draw": partial(measure_draw, side=64, steps=20),
    "tiny_start": partial(measure_start, side=64),
}
TOGETHER = {"unet": measure_unet, "bf16": measure_bf16, "ti": measure_ti}


def make_model(folder: Path) -> None:
    """SD v1.5's shapes with random fp32 weights, as a folder and as a single file."""
    import torch

    from minisd.formats import diffusers, single_file
    from minisd.formats.parts import MODULES, SD1_SCHEDULER, TOKENIZER, PipelineParts
    from minisd.models import text, unet, vae

    configs = {"unet": unet.SD15, "vae": vae.SD15, "text_encoder": text.SD15}
    torch.manual_seed(0)
    pipeline = PipelineParts(
        **{part: MODULES[part](config) for part, config in configs.items()},
        scheduler=SD1_SCHEDULER,
        tokenizer=TOKENIZER,
        pipeline_class="StableDiffusionPipeline",
    )
    diffusers.save(folder, pipeline)
    single_file.save(folder.with_name(folder.name + ".safetensors"), pipeline)
    del pipeline
    gc.collect()


def run(*flags: str, root: Path = ROOT) -> dict:
    command = [sys.executable, str(root / "tests" / "cost.py"), *flags]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "COST_BEGUN": str(time.time()),
        "PYTHONPATH": str(root),
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(flags)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="folder in the diffusers layout; without it one is made")
    parser.add_argument("--tasks", nargs="+", choices=ALONE | TOGETHER, default=list(ALONE | TOGETHER))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--before", type=Path, help="checkout of another commit, to compare with that")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    parser.add_argument("--tool", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        measure = ALONE.get(args.task) or TOGETHER[args.task]
        print(json.dumps(measure(args.tool, args.model) if args.tool else measure(args.model)))
        return
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or str(Path(folder) / "sd15")
        if not args.model and not all(task.startswith("tiny_") for task in args.tasks):
            code = f"import cost, pathlib; cost.make_model(pathlib.Path({model!r}))"
            subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)
        if args.before and (together := set(args.tasks) & set(TOGETHER)):
            parser.error(
                f"--before: {', '.join(sorted(together))} are measured in one process with diffusers"
            )
        report(model, args.tasks, args.rounds, args.before)


def report(model: str, tasks: list[str], rounds: int, before: Path | None) -> None:
    import diffusers
    import torch

    size = sum(f.stat().st_size for f in Path(model).rglob("*.safetensors")) / 2**30
    versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}"
    machine = f"{torch.get_num_threads()} threads, {time.strftime('%Y-%m-%d')}"
    print(f"{versions}, {machine}; the model is {size:.2f} GB\n")
    peer = "before" if before else "diffusers"
    print(f"| median of {rounds} | minisd | {peer} | ratio |\n|---|---|---|---|")
    for task in tasks:
        tiny = task.startswith("tiny_")
        flags = ("--task", task, "--model", TINY if tiny else model)
        seen: dict[str, dict[str, list[float]]] = {}
        if task in TOGETHER:
            seen = run(*flags)
        else:
            for _ in range(rounds):
                for tool in ("minisd", peer):
                    where = ("minisd", before.resolve()) if tool == "before" else (tool, ROOT)
                    for name, value in run(*flags, "--tool", where[0], root=where[1]).items():
                        seen.setdefault(name, {}).setdefault(tool, []).append(value)
        for name, times in seen.items():
            name = f"the tiny model, {name}" if tiny else name
            ours, theirs = (statistics.median(times[tool]) for tool in ("minisd", peer))
            ratio = statistics.median(b / a for a, b in zip(times["minisd"], times[peer], strict=True))
            print(f"| {name} | {ours:.3g} | {theirs:.3g} | {ratio:.2f} x |", flush=True)
    print("\nratio: the median of the rounds' ratios; above 1 minisd is faster or smaller")


if __name__ == "__main__":
    main()
