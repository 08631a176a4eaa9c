"""The model card: README.md, which says what a run made, how, and how to load it.

Its content comes from the files of the result, the method's docstring and the flags. Of a path on this
computer, only the last name is in it.
"""

import hashlib
import json
import os
import shlex
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path

from minisd import files, reading, registry
from minisd.formats import diffusers, hub
from minisd.options import TINY, Group, default_of, free_flags
from minisd.training.run_folder import RunFolder
from minisd.training.step import Trainer

CARD = "README.md"
WHOLE = {
    "start": "pipe = diffusers.DiffusionPipeline.from_pretrained({result!r})",
    "others": "For A1111 (`models/Stable-diffusion`) and ComfyUI (`models/checkpoints`), "
    "`python sample.py --model FOLDER --export FILE.safetensors` makes a single file of it.",
}


@dataclass(frozen=True)
class Kind:
    """A kind of result. `start` and `load` are the Python that makes diffusers' `pipe` and loads a file into
    it; `others` is about other programs. In all texts {base}, {result} and {file} stand for the base model,
    the result and the file."""

    tag: str = ""
    task: str = "text-to-image"  # as the hub calls what it does
    sample: str = "--model {base} --adapter {result}"  # flags of sample.py
    start: str = "pipe = diffusers.DiffusionPipeline.from_pretrained({base!r})"
    load: str = ""
    others: str = "A1111 and ComfyUI do not read this kind of file."


# By the class in model_index.json, or by the kind of adapter (minisd/adapters/).
KINDS = {
    "StableDiffusionPipeline": Kind(sample="--model {result}", **WHOLE),
    "StableDiffusionInstructPix2PixPipeline":
        Kind("instruct-pix2pix", "image-to-image", "--model {result} --image IMAGE", **WHOLE),
    "StableDiffusionInpaintPipeline":
        Kind("inpainting", "image-to-image", "--model {result} --image IMAGE --mask MASK", **WHOLE),
    "DDPMPipeline": Kind("", "unconditional-image-generation", "--model {result}", WHOLE["start"]),
    "lora": Kind(
        "lora",
        load="pipe.load_lora_weights({result!r}, weight_name={file!r})",
        others="A1111 (`models/Lora`) and ComfyUI (`models/loras`) read LoRA files with kohya's names, which "
        "training with `--save_format kohya` leaves.",
    ),
    "token_embedding": Kind(
        "textual_inversion",
        load="pipe.load_textual_inversion({result!r}, weight_name={file!r})",
        others="A1111 (`embeddings`) and ComfyUI (`models/embeddings`) read `{file}`; the name that the file "
        "has there is what to type, in ComfyUI after `embedding:`.",
    ),
    "custom_diffusion": Kind(
        "custom-diffusion", load="pipe.unet.load_attn_procs({result!r}, weight_name={file!r}, _pipeline=pipe)"
    ),
    "controlnet": Kind(
        "controlnet",
        sample="--model {base} --controlnet {result} --control_image IMAGE",
        start="controlnet = diffusers.ControlNetModel.from_pretrained({result!r})\n"
        "pipe = diffusers.StableDiffusionControlNetPipeline.from_pretrained({base!r}, controlnet=controlnet)",
        others="A1111's ControlNet extension (`models/ControlNet`) and ComfyUI (`models/controlnet`) read "
        "`{file}`.",
    ),
}  # fmt: skip
OWN = None, "It was trained from random weights: its licence is for its makers to choose."
APACHE = "apache-2.0", "The base model is under the Apache License 2.0."
OPEN_RAIL = (
    "creativeml-openrail-m",
    "Stable Diffusion v1.x is under the CreativeML Open RAIL-M, whose restrictions of use go with everything "
    "that is made from it. If the base model has another licence, that one counts: then correct this card.",
)


def write(trainer: Trainer, folder: RunFolder, names: list[str], repository: str | None) -> list[str]:
    """Write the card of a result that consists of the files `names`, unless a README.md is there that minisd
    did not write, or that was changed. Returns the names of what else belongs to the result: the card, and
    the validation images."""
    every = trainer.options.validation_interval(trainer.updates_per_epoch)
    images = [f"validation/step-{step:06}.png" for step in range(every, trainer.step, every)]
    images = [name for name in images if (folder.path / name).is_file()]
    path = folder.path / CARD
    before = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if path.exists() and before != marked(before.rpartition("<!--")[0]):
        print(f"{path} is not minisd's, or was changed: it stays as it is, and there is no model card")
        return images
    files.write_text(path, marked(text(trainer, folder, names, repository or reading.real(folder.path).name)))
    return [*images, CARD]


def marked(content: str) -> str:
    """A card with its last line, which tells whether it was changed."""
    return f"{content}<!-- written by minisd: {hashlib.sha256(content.encode()).hexdigest()} -->\n"


def text(trainer: Trainer, folder: RunFolder, names: list[str], result: str) -> str:
    """The card, for people who load the result by the name `result`."""
    o, method = trainer.options, folder.recorded["method"]
    model = getattr(o, "model", None)
    is_tiny = model is not None and reading.real(Path(model).expanduser()) == reading.real(TINY)
    base = "minisd/tiny" if is_tiny else model and public(model)
    found = kinds(folder.path, names)
    prompts = trainer.method.validation_prompts or trainer.method.training_prompts()
    prompts = list(dict.fromkeys(line(prompt) for prompt, _ in prompts if prompt))
    licence, note = APACHE if is_tiny else OPEN_RAIL if base else OWN
    task = next((kind.task for kind, _ in found), None)
    tags = ["diffusers", "minisd", base and "stable-diffusion", method.replace("_", "-")]
    tags += [kind.tag for kind, _ in found]
    drawn = prompts if task == "text-to-image" else []
    facts = {
        "license": licence,
        "library_name": "diffusers",
        "base_model": base if base == model and hub.is_id(base or "") else None,
        "instance_prompt": getattr(o, "instance_prompt", None),
        "pipeline_tag": task,
        "tags": list(dict.fromkeys(filter(None, tags))),
        "inference": task == "text-to-image" or None,
        "widget": [{"text": prompt, "output": {"url": "result.png"}} for prompt in drawn] or None,
    }
    header = [f"{k}: {json.dumps(v, ensure_ascii=False)}\n" for k, v in facts.items() if v is not None]
    values = {"base": base, "result": result}
    code = dict.fromkeys(kind.start.format(**values) for kind, _ in found)
    code |= dict.fromkeys(kind.load.format(**values, file=file) for kind, file in found if kind.load)
    code = "\n".join(["import diffusers", "", *code])
    quoted = {name: shlex.quote(value or "") for name, value in values.items()}
    prompt = f" --prompt {shlex.quote(prompts[0])}" if prompts else ""
    parts = [
        f"---\n{''.join(header)}---",
        f"# {line(result)}",
        registry.summary("methods", method),
        f"Base model: `{base}`." if base else "There is no base model.",
        "![what it learned](result.png)",
        *(["The prompts:", "\n".join(f"    {prompt}" for prompt in prompts)] if prompts else []),
        "## How it was trained",
        f"With minisd, in {trainer.step} updates of {trainer.images_per_update} images:",
        f"    {command(o, {'method': method, 'model': base, 'max_train_steps': trainer.step})}",
        "## How to use it",
        *([f"With diffusers:\n\n```python\n{code}\n```", "With minisd:"] if found else []),
        *dict.fromkeys(f"    python sample.py {k.sample.format(**quoted)}{prompt}" for k, _ in found),
        *dict.fromkeys(kind.others.format(file=file) for kind, file in found),
        f"## Licence\n\n{note}",
    ]
    return "\n\n".join(parts) + "\n\n"


def kinds(folder: Path, names: list[str]) -> list[tuple[Kind, str]]:
    """The known kinds among the files of a result, each with its file (.safetensors, if there are two)."""
    if diffusers.INDEX in names:
        pipeline = reading.read_json(folder / diffusers.INDEX).get("_class_name")
        return [(KINDS[pipeline], diffusers.INDEX)] if pipeline in KINDS else []
    found = {}
    for name in sorted(names):
        with suppress(ValueError, KeyError):
            module = registry.match("adapters", files.read(folder / name))
            found[Path(name).stem] = KINDS[module.__name__.rpartition(".")[2]], name
    return list(found.values())


def command(options: Group, flags: dict) -> str:
    """The command with these flags, and with those that change the result and are not the defaults."""
    counted = [f for f in fields(options) if f.name not in free_flags(type(options))]
    values = {f.name: getattr(options, f.name) for f in counted if getattr(options, f.name) != default_of(f)}
    words = ["python", "train.py"]
    for name, value in {**flags, **values, **flags}.items():  # `flags` come first, and they count
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            words += [f"--{name}", *(public(v) for v in (value if isinstance(value, list) else [value]))]
    return line(shlex.join(words))


def public(value: object) -> str:
    """A flag's value; of a path, only the last name."""
    word = str(value)
    is_path = isinstance(value, Path) or os.path.isabs(os.path.expanduser(word)) or os.path.exists(word)
    return os.path.basename(os.path.abspath(os.path.expanduser(word))) if is_path else word


def line(words: str) -> str:
    """Text as one line that can be printed."""
    return " ".join("".join(c if c.isprintable() else " " for c in words).split())
