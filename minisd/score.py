"""Score a folder of images by what CLIP and DINO see in them: likeness to other images, and to prompts.

    minisd score samples --like photos --clip openai/clip-vit-large-patch14 --dino facebook/dino-vits16
    minisd score samples --prompts prompts.txt --clip ./clip --json scores.json

CLIP-I and DINO are the mean cosine similarity of an image's embedding to those of the images of --like,
CLIP-T that to the embedding of the image's prompt (Ruiz et al. 2022, arXiv 2208.12242, section 4.2). Prompts
are those that PNG files record, or the lines of --prompts. Each score has a 95 % interval: the bootstrap over
the images (Efron 1979). A hub id is downloaded, as it was asked for; a folder is read without the network.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from minisd import cli, files, reading
from minisd.data import images
from minisd.device import usable
from minisd.formats import hub
from minisd.options import require
from minisd.sampling import infotext

BATCH, RESAMPLES = 16, 1000  # images, or prompts, at once; means of the bootstrap
SHEETS = "-grid.png", "-heat.png", "preview.png"  # what sample.py leaves beside its images


def load(flag: str, source: str, device: str) -> tuple[torch.nn.Module, Callable]:
    """The model in a folder, or of a hub id, and the processor of its inputs. ValueError, naming the flag."""
    kinds = ("CLIPModel", "CLIPProcessor") if flag == "clip" else ("AutoModel", "AutoImageProcessor")
    model, processor = hub.pretrained(kinds, source, flag)
    return model.to(usable(device)).eval(), processor


@torch.no_grad()
def embeddings(of: Callable, model: torch.nn.Module, processor: Callable, values: list) -> Tensor:
    """The embeddings (n, d) by `of_images` or `of_texts`, each of length 1, in fp32 on the CPU."""
    parts = (values[start : start + BATCH] for start in range(0, len(values), BATCH))
    return F.normalize(torch.cat([of(model, processor, part) for part in parts]).float().cpu(), dim=1)


def of_images(model: torch.nn.Module, processor: Callable, paths: list[Path]) -> Tensor:
    """CLIP's projected embeddings; of another model the last state of the first token, which is DINO's class
    token."""
    inputs = processor(images=[*map(images.open_image, paths)], return_tensors="pt").to(model.device)
    if hasattr(model, "get_image_features"):
        return model.visual_projection(model.vision_model(**inputs).pooler_output)
    return model(**inputs).last_hidden_state[:, 0]


def of_texts(model: torch.nn.Module, processor: Callable, texts: list[str]) -> Tensor:
    """CLIP's embeddings of prompts, cut off after its length."""
    inputs = processor(text=texts, return_tensors="pt", padding=True, truncation=True).to(model.device)
    return model.text_projection(model.text_model(**inputs).pooler_output)


def interval(values: Tensor) -> tuple[float, float]:
    """The bounds between which 95 % of the means lie of as many values, drawn with repetition."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
    low, high = torch.quantile(values.double()[drawn].mean(dim=1), torch.tensor([0.025, 0.975]).double())
    return low.item(), high.item()


def listed(folder: Path, flag: str) -> list[Path]:
    """The images of a folder, without the sheets of sample.py. ValueError if there are none."""
    require(folder.is_dir(), f"{flag} {folder} is no folder")
    found = [path for path in images.list_images(folder) if not path.name.endswith(SHEETS)]
    require(found, f"{flag} {folder} holds no images")
    return found


def prompts_of(paths: list[Path], file: Path | None) -> list[str] | None:
    """The prompt of each image: a line of the file, or what the PNG records; None if one records nothing."""
    if file:
        lines = [line.strip() for line in reading.text(file).splitlines() if line.strip()]
        need = f"one for each of the {len(paths)} images, in the order of their names, or one for all"
        require(len(lines) in (1, len(paths)), f"--prompts {file} has {len(lines)} lines: {need}")
        return lines * (len(paths) if len(lines) == 1 else 1)
    try:
        return [infotext.parse(infotext.read(path))[0] for path in paths]
    except ValueError:
        return None


def scores(paths: list[Path], o: argparse.Namespace) -> dict[str, Tensor]:
    """The scores by name, with a value for each image, (n,)."""
    like, prompts, found = o.like and listed(o.like, "--like"), prompts_of(paths, o.prompts), {}
    require(o.clip or o.dino, "give --clip, --dino or both")
    require(like or not o.dino, "--dino needs --like")
    require(o.clip or not o.prompts, "--prompts needs --clip")
    require(like or prompts, "nothing to compare with: give --like, --prompts or both")
    for flag, source in (("clip", o.clip), ("dino", o.dino)):
        if source:
            model, processor = load(flag, source, o.device)
            own = embeddings(of_images, model, processor, paths)  # (n, d)
            if like:
                others = embeddings(of_images, model, processor, like)  # (m, d)
                found["CLIP-I" if flag == "clip" else "DINO"] = (own @ others.T).mean(dim=1)
            if prompts and flag == "clip":
                found["CLIP-T"] = (own * embeddings(of_texts, model, processor, prompts)).sum(dim=1)
    return found


def main() -> int:
    parser = cli.Parser(prog="minisd score", description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("images", type=Path, metavar="DIR", help="the images to score")
    parser.add_argument("--like", type=Path, metavar="DIR", help="the images that they should be like")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="a line for each image, or one for all")
    parser.add_argument("--clip", metavar="MODEL", help="a folder or hub id of a CLIP model of transformers")
    parser.add_argument("--dino", metavar="MODEL", help="the same of a DINO model, or of another ViT")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the scores, of each image too, to it"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace --json if it is there")
    o, table = parser.parse_args(), {}
    there = o.json and o.json.exists() and not o.overwrite
    require(not there, f"--json {o.json} exists: --overwrite replaces it")
    paths = listed(o.images, "the folder")
    for name, values in scores(paths, o).items():
        low, high = interval(values)
        table[name] = {"mean": values.mean().item(), "low": low, "high": high, "values": values.tolist()}
        print(f"{name:6} {table[name]['mean']:7.4f}  from {low:.4f} to {high:.4f}, {len(values)} images")
    if o.json:
        names = [path.name for path in paths]
        files.write_json(o.json, {"clip": o.clip, "dino": o.dino, "images": names, **table})
    return 0


if __name__ == "__main__":
    cli.run("minisd score", main)
