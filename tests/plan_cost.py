"""What `--plan` says beside what an update takes, on this machine's CPU.

    python tests/plan_cost.py                       the table of docs/scale.md
    python tests/plan_cost.py --sd15                the table of SD v1.5's methods, planned alone
    python tests/plan_cost.py --only lora           the rows with this in their names

Planned is the tensors of two updates that are made without numbers. Measured is what torch's CPU allocator
gives out in two real updates, as torch.profiler records it: what operations take for themselves is in it,
what Python and libraries take is not.
"""

import argparse
import gc
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from torch.profiler import ProfilerActivity, profile, record_function

from minisd import files, registry, testing
from minisd.formats import config_json, diffusers
from minisd.formats.parts import MODULES, SD1_SCHEDULER, TOKENIZER, PipelineParts
from minisd.models import text, unet, vae
from minisd.training import loop, plan
from minisd.training.distributed import Processes
from minisd.training.step import Trainer
from tests import cost_methods

CAT = Path(__file__).resolve().parent.parent / "cat"
WORDS = ["--placeholder_token", "<cat>", "--initializer_token", "cat"]
BOTH = ["--instance_prompt", "a cat", "--train_text_encoder", "--mixed_precision", "bf16"]
CONFIGURATIONS = {
    "text_to_image": ["--train_batch_size", 4],
    "text_to_image, checkpointing, accumulation, average": [
        *[
            "--train_batch_size",
            4,
            "--gradient_accumulation_steps",
            2,
            "--gradient_checkpointing",
            "--use_ema",
        ]
    ],
    "dreambooth, text encoder, bf16": [*BOTH, "--train_batch_size", 2],
    "lora, bf16": ["--train_batch_size", 4, "--mixed_precision", "bf16"],
    "lora, encoding in every step": ["--train_batch_size", 2, "--no-cache_latents", "--rank", 32],
    "textual_inversion": [*WORDS, "--train_batch_size", 4],
    "lcm": ["--train_batch_size", 2],
    "autoencoder, bf16": ["--train_batch_size", 1, "--mixed_precision", "bf16"],
}

BF16 = ["--mixed_precision", "bf16"]
CHECKPOINTING = [*BF16, "--gradient_checkpointing"]
SD15_COLUMNS = [(1, []), (1, BF16), (4, BF16), (4, CHECKPOINTING), (4, [*CHECKPOINTING, "--use_8bit_adam"])]
DRAWN = ["--ddim_steps", 2]  # further ones take no more memory
SD15_METHODS = {  # their data, as cost_methods makes it, and their flags
    "text_to_image": ("captioned", []),
    "dreambooth, text encoder": ("plain", ["--instance_prompt", "a", "--train_text_encoder"]),
    "lora": ("captioned", []),
    "textual_inversion": ("plain", WORDS),
    "custom_diffusion": ("plain", ["--instance_prompt", "<a>", "--modifier_token", "<a>"]),
    "controlnet": ("conditioned", []),
    "instruct_pix2pix": ("edits", []),
    "lcm": ("captioned", []),
    "erase": ("", ["--erase", "a", *DRAWN]),
    "sliders": ("", ["--target_prompt", "a", "--positive_prompt", "b", "--negative_prompt", "c", *DRAWN]),
    "autoencoder": ("plain", []),
}


def make(folder: Path) -> None:
    """A Stable Diffusion of an eighth of the parameters, with random weights."""
    widths, width = (96, 192, 384, 384), 256
    configs = {
        "unet": replace(unet.SD15, block_out_channels=widths, cross_attention_dim=width),
        "vae": replace(vae.SD15, block_out_channels=(32, 64, 128, 128)),
        "text_encoder": replace(text.SD15, hidden_size=width, intermediate_size=4 * width, num_heads=4),
    }
    networks = {part: MODULES[part](config) for part, config in configs.items()}
    further = {"scheduler": SD1_SCHEDULER, "tokenizer": TOKENIZER}
    diffusers.save(folder, PipelineParts(**networks, **further, pipeline_class="StableDiffusionPipeline"))


def measure(method: str, o) -> int:
    """The most bytes of tensors from the end of loading on, in two updates."""
    gc.collect()  # a model of before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        m = testing.new(method, o)
        trained = m.setup()
        m.sd.original = {}  # the pages of the model's file, which it keeps if the networks are in bf16
        dataset, _ = m.datasets()
        with record_function("loaded"):
            trainer = Trainer(m, trained, len(dataset), Processes())
        source = loop.micro_batches(trainer, dataset)
        for _ in range(2):
            trainer.update(source)
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    now = peak = loaded = 0
    for event in events:
        loaded |= event.name() == "loaded"
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now) if loaded else peak
    return peak


def planned(name: str, *flags: object, gpu: bool = False) -> plan.Meter:
    """What is planned with these flags; `name` begins with the method's."""
    method = name.split(",")[0]
    o = testing.options(method, *flags)
    return plan.trace(registry.load_class("methods", method), o, testing.new(method, o).read, gpu)


def compare(name: str, *flags: object) -> tuple[plan.Meter, int]:
    """What is planned, and what is measured."""
    return planned(name, *flags), measure(name.split(",")[0], testing.options(name.split(",")[0], *flags))


def compare_larger(name: str, model: Path) -> tuple[plan.Meter, int]:
    """The same for one of CONFIGURATIONS."""
    flags = ["--model", model, "--data", CAT, "--center_crop", "--resolution", 256]
    return compare(name, *flags, *CONFIGURATIONS[name], "--output_dir", model.parent / "out")


def table_sd15(folder: Path, only: str) -> None:
    """The plans of SD v1.5's methods at 512 pixels on a GPU, with configs alone."""
    for part, config in {"unet": unet.SD15, "vae": vae.SD15, "text_encoder": text.SD15}.items():
        config_json.write(folder / "model" / part, part, config)
    files.write_json(folder / "model" / diffusers.SCHEDULER, SD1_SCHEDULER)
    shutil.copytree(TOKENIZER, folder / "model" / "tokenizer")
    cost_methods.make(folder / "data", pictures=2, side=512)
    columns = [["--train_batch_size", n, *flags] for n, flags in SD15_COLUMNS]
    print(f"| | {' | '.join(' '.join(map(str, c)) for c in columns)} | TFLOP an image |")
    print("|---" * (len(columns) + 2) + "|")
    for name, (data, flags) in SD15_METHODS.items():
        if only in name:
            where = ["--data", folder / "data" / data, "--center_crop"] if data else []
            given = ["--model", folder / "model", "--resolution", 512, *where, *flags]
            meters = []
            for column in columns:
                refused = name == "sliders" and "--gradient_checkpointing" in column
                meters.append(None if refused else planned(name, *given, *column, gpu=True))
            sizes = " | ".join(f"{m.peak.total() / plan.GB:.1f}" if m else "-" for m in meters)
            print(f"| {name} | {sizes} | {meters[0].flops / 1e12:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="")
    parser.add_argument("--sd15", action="store_true")
    o = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        if o.sd15:
            return table_sd15(Path(temporary), o.only)
        make(Path(temporary) / "model")
        print("| | planned, MB | measured, MB | |\n|---|---|---|---|")
        for name in (name for name in CONFIGURATIONS if o.only in name):
            meter, measured = compare_larger(name, Path(temporary) / "model")
            total = meter.peak.total()
            figures = f"{total / 2**20:.0f} | {measured / 2**20:.0f} | {total / measured - 1:+.1%}"
            print(f"| {name} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
