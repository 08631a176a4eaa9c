"""What the training methods cost beside the diffusers scripts, in one run on this machine.

    git clone https://github.com/huggingface/diffusers
    python tests/cost_methods.py --scripts diffusers/examples
    python tests/cost_methods.py --before CHECKOUT              beside another commit of minisd instead
    python tests/cost_methods.py --bf16 --full --side 256 --batch 1 --steps 16 --first 6 --turns 1

Both get the same flags, model, data and batch, each in a process of its own, in turns; with --bf16, for
all methods, minisd in bf16 beside minisd in fp32, up to the last step. --full is SD v1.5's widths, not a
tenth. Steps are timed where the tool's own bar passes them, so that neither starting nor saving counts; start
is the time until the first. The peak is the process's resident memory, all of it: what was imported too. The
ratio of the CPU's time is what a machine that others use does not change.
"""

import argparse
import fcntl
import os
import re
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# By method, with what is special about it: the script's path in diffusers/examples, or nothing; the flags.
MODEL = "--pretrained_model_name_or_path=model --max_train_steps={steps}"
UNCONDITIONAL = "unconditional_image_generation/train_unconditional.py"
PIXELS = (
    "--train_data_dir=plain --num_epochs=1 --eval_batch_size=1 --ddpm_num_inference_steps=2 --center_crop "
    "--model_config_name_or_path"
)
METHODS = {
    "unconditional": (UNCONDITIONAL, f"{PIXELS}={ROOT}/minisd/tiny/unconditional"),
    "unconditional, of DDPM's shape": (UNCONDITIONAL, f"{PIXELS}=ddpm"),
    "text_to_image": (
        "text_to_image/train_text_to_image.py",
        f"{MODEL} --train_data_dir=captioned --center_crop --random_flip --seed=0",
    ),
    "textual_inversion": (
        "textual_inversion/textual_inversion.py",
        f"{MODEL} --train_data_dir=plain --placeholder_token=<cat> --initializer_token=cat --seed=0",
    ),
    "dreambooth": (
        "dreambooth/train_dreambooth.py",
        f"{MODEL} --instance_data_dir=plain --instance_prompt=a --center_crop --seed=0",
    ),
    "lora": (
        "text_to_image/train_text_to_image_lora.py",
        f"{MODEL} --train_data_dir=captioned --center_crop --random_flip --seed=0",
    ),
    "custom_diffusion": (
        "custom_diffusion/train_custom_diffusion.py",
        f"{MODEL} --instance_data_dir=plain --instance_prompt=<new1> --modifier_token=<new1> "
        "--initializer_token=cat --seed=0",
    ),
    "controlnet": (
        "controlnet/train_controlnet.py",
        f"{MODEL} --train_data_dir=conditioned --seed=0",
    ),
    "instruct_pix2pix": (
        "instruct_pix2pix/train_instruct_pix2pix.py",
        f"{MODEL} --train_data_dir=edits --random_flip --conditioning_dropout_prob=0.05 --seed=0",
    ),
    "lcm": ("", f"{MODEL} --train_data_dir=captioned --center_crop"),
    "dpo": (
        "",
        f"{MODEL} --train_data_dir=edits --rejected_image_column=input_image --image_column=edited_image "
        "--caption_column=edit_prompt --center_crop",
    ),
    "erase": ("", f"{MODEL} --erase=cat --ddim_steps=10"),
    "sliders": (
        "",
        f"{MODEL} --target_prompt=cat --positive_prompt=big --negative_prompt=small --ddim_steps=10",
    ),
}


def make(folder: Path, pictures: int, side: int, full: bool) -> None:
    """A Stable Diffusion with random weights, a pixel UNet's config, and `pictures` in four layouts."""
    import json
    from dataclasses import replace

    import numpy as np
    import torch
    from PIL import Image

    from minisd.formats import config_json, diffusers
    from minisd.formats.parts import MODULES, SD1_SCHEDULER, TOKENIZER, PipelineParts
    from minisd.models import text, unet, unet2d, vae

    small = {
        "unet": replace(unet.SD15, block_out_channels=(32, 64, 128, 128), cross_attention_dim=64),
        "vae": replace(vae.SD15, block_out_channels=(32, 64, 64, 64)),
        "text_encoder": replace(text.SD15, hidden_size=64, intermediate_size=256, num_layers=4, num_heads=4),
    }
    torch.manual_seed(0)
    wide = {"unet": unet.SD15, "vae": vae.SD15, "text_encoder": text.SD15}
    pipeline = PipelineParts(
        **{part: MODULES[part](config) for part, config in (wide if full else small).items()},
        scheduler=SD1_SCHEDULER,
        tokenizer=TOKENIZER,
        pipeline_class="StableDiffusionPipeline",
    )
    diffusers.save(folder / "model", pipeline)
    config = replace(unet2d.DDPM, sample_size=side, block_out_channels=(32, 32, 64, 64, 64, 64))
    config_json.write(folder / "ddpm", "unet2d", config)
    kinds = {
        "plain": None,
        "captioned": lambda i: {"file_name": f"{i}.png", "text": f"picture {i}"},
        "conditioned": lambda i: {
            "file_name": f"{i}.png",
            "conditioning_image_file_name": f"{(i + 1) % pictures}.png",
            "text": f"picture {i}",
        },
        "edits": lambda i: {
            "input_image_file_name": f"{i}.png",
            "edited_image_file_name": f"{(i + 1) % pictures}.png",
            "edit_prompt": f"make it {i}",
        },
    }
    for name, row in kinds.items():
        (folder / name).mkdir()
        for i in range(pictures):
            pixels = np.random.default_rng(i).integers(0, 255, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
        if row:
            lines = "".join(json.dumps(row(i)) + "\n" for i in range(pictures))
            (folder / name / "metadata.jsonl").write_text(lines)


def cpu(pid: int) -> float:
    """Seconds that a process has computed."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def heard(terminal: int) -> bytes:
    """What a terminal's process has written, or nothing if it has ended."""
    try:
        return os.read(terminal, 65536)
    except OSError:
        return b""


def measure(
    name: str, command: list[str], folder: Path, steps: int, skip: int, whole: bool = True
) -> dict[str, float]:
    """Steps a second, by the clock and by the CPU's time, seconds until the first one, and peak in MB. Unless
    it is to be the `whole` command, it is ended after its last step."""
    env = os.environ | {"HF_HUB_OFFLINE": "1", "TQDM_MININTERVAL": "0", "PYTHONUNBUFFERED": "1"}
    begun, said, marks = time.perf_counter(), b"", {}
    terminal, theirs = os.openpty()  # into a file a bar is a line every few seconds
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    child = subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.DEVNULL, stderr=theirs)
    os.close(theirs)
    while part := heard(terminal):
        said += part
        for line in re.split(rb"[\r\n]", said)[-20:]:
            done = re.search(rb"\b(\d+)/%d\b" % steps, line)
            if done and line.lstrip().startswith((name.encode(), b"Steps", b"Epoch")):  # no other bar
                marks.setdefault(int(done[1]), (time.perf_counter(), cpu(child.pid)))
        if steps in marks and not whole:
            child.kill()
    os.close(terminal)
    status, usage = os.wait4(child.pid, 0)[1:]
    child.returncode = status
    if status and (whole or steps not in marks):
        raise SystemExit(f"{' '.join(command)} failed:\n{said.decode(errors='replace')[-3000:]}")
    first = min(n for n in marks if n >= skip)
    count = steps - first
    wall, used = (b - a for a, b in zip(marks[first], marks[steps], strict=True))
    start = marks[min(n for n in marks if n)][0] - begun
    return {"wall": count / wall, "cpu": count / used, "start": start, "peak": usage.ru_maxrss / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    peer = parser.add_mutually_exclusive_group(required=True)
    peer.add_argument("--scripts", type=Path, help="the folder examples of diffusers")
    peer.add_argument("--before", type=Path, help="checkout of another commit, to compare with that")
    peer.add_argument("--bf16", action="store_true", help="bf16 beside fp32")
    parser.add_argument("--full", action="store_true", help="SD v1.5's widths: 4 GB of disk, 16 GB of memory")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=113)
    parser.add_argument(
        "--first", type=int, default=13, help="step from which time counts; by then memory is settled"
    )
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--side", type=int, default=64)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        code = f"import pathlib; from tests.cost_methods import make; make(pathlib.Path({name!r}), "
        code += f"{args.steps * args.batch}, {args.side}, {args.full})"
        subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
        report(args, folder)


def report(args, folder: Path) -> None:
    threads = os.environ["OMP_NUM_THREADS"]
    print(f"{args.side}x{args.side}, batch {args.batch}, {threads} threads, {time.strftime('%Y-%m-%d')}\n")
    peer = "before" if args.before else "fp32" if args.bf16 else "diffusers"
    print(f"| method | steps/s | {peer} | ratio | of CPU time | peak MB | {peer} | ratio | start s |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for row in args.methods:
        script, flags = METHODS[row]
        if args.scripts and not script:
            continue
        common = flags.format(steps=args.steps).split()
        common += [f"--resolution={args.side}", f"--train_batch_size={args.batch}"]
        method = row.partition(",")[0]
        ours = ["train.py", "--method", method]
        if not script.startswith("unconditional"):
            # Not timed, but waited for.
            ours += ["--num_validation_images=1", "--validation_guidance_scale=1"]
        tools = {"minisd": [str(ROOT / ours[0]), *ours[1:], *["--mixed_precision=bf16"] * args.bf16]}
        if args.scripts:
            tools[peer] = [str(args.scripts / script)]
        else:
            tools[peer] = [str((args.before or ROOT).resolve() / ours[0]), *ours[1:]]
        seen: dict[str, list[dict]] = {tool: [] for tool in tools}
        for turn in range(args.turns):
            for tool in tools if turn % 2 else reversed(tools):
                own = [f"--output_dir={folder / f'{row}-{tool}-{turn}'}"]
                command = [sys.executable, *tools[tool], *common, *own]
                seen[tool].append(measure(method, command, folder, args.steps, args.first, not args.bf16))
                shutil.rmtree(folder / own[0].partition("=")[2], ignore_errors=True)
        ours, theirs = ({k: statistics.median(s[k] for s in seen[t]) for k in seen[t][0]} for t in tools)
        print(
            f"| {row} | {ours['wall']:.2f} | {theirs['wall']:.2f} | {ours['wall'] / theirs['wall']:.2f} "
            f"| {ours['cpu'] / theirs['cpu']:.2f} | {ours['peak']:.0f} | {theirs['peak']:.0f} "
            f"| {ours['peak'] / theirs['peak']:.2f} | {ours['start']:.0f}, {theirs['start']:.0f} |",
            flush=True,
        )
    print(f"\nratio: minisd to {peer}; of steps above 1 is faster, of the peak below 1 is smaller")


if __name__ == "__main__":
    main()
