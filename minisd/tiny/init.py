"""Write an untrained tiny model: random weights, and a vocabulary for the words of the data.

python -m minisd.tiny.init OUT --data DATA      DATA as written by minisd.tiny.data
"""

import argparse
import collections
import json
import re
from pathlib import Path

import torch

from minisd import cli, files, reading
from minisd.formats import config_json, diffusers
from minisd.formats.parts import PIPELINES, PipelineParts
from minisd.models.text import TextConfig, TextEncoder
from minisd.models.tokenizer import END, START
from minisd.models.unet import UNet
from minisd.models.vae import AutoencoderKL
from minisd.tiny.clip_vocabulary import byte_names

HERE = Path(__file__).parent
VOCABULARY = 2048
# Words of prompts that are not in the captions, and how often to count each of them.
FURTHER = """the photo rendering cropped close up bright dark large nice cool good clean dirty weird my one
art depiction illustration painting drawing in with and of it make turn into noto black white brown teal style
sks"""
OFTEN = 200


def count_words(data: Path) -> collections.Counter:
    """Count the words of the captions and of the names of all emoji, split as by CLIP's tokenizer."""
    texts = [*(data / "names.txt").read_text().splitlines(), *[FURTHER] * OFTEN]
    for part in ("train", "noto"):
        for line in (data / part / "metadata.jsonl").read_text().splitlines():
            text = json.loads(line)["text"]
            texts += [text] if isinstance(text, str) else text
    return collections.Counter(w for text in texts for w in re.findall(r"[a-z]+|[0-9]|[^\sa-z0-9]+", text))


def merges_of(words: collections.Counter, count: int) -> list[tuple[str, str]]:
    """Byte pair encoding (Sennrich et al. 2016, arXiv 1508.07909): repeatedly merge the most common pair of
    neighbours. Of equally common pairs the last in the alphabet is merged first."""
    split = {(*word[:-1], word[-1] + "</w>"): n for word, n in words.items() if word.isascii()}
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        pairs = collections.Counter()
        for word, n in split.items():
            for pair in zip(word, word[1:], strict=False):
                pairs[pair] += n
        if not pairs:
            raise ValueError(f"--data: its words allow only {len(merges)} merges, not {count}")
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        split = {_merged(word, best): n for word, n in split.items()}
    return merges


def _merged(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    out, i = [], 0
    while i < len(word):
        both = word[i : i + 2] == pair
        out.append("".join(pair) if both else word[i])
        i += 2 if both else 1
    return tuple(out)


def write_tokenizer(folder: Path, words: collections.Counter) -> None:
    """Write vocab.json, merges.txt and tokenizer_config.json, in the order and the format of CLIP's."""
    singles = byte_names()
    singles += [c + "</w>" for c in singles]
    merges = merges_of(words, VOCABULARY - len(singles) - 2)
    entries = [*singles, *(a + b for a, b in merges), START, END]
    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    vocabulary = {entry: i for i, entry in enumerate(entries)}
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 24, **special}
    folder.mkdir(parents=True, exist_ok=True)
    files.write_text(folder / "vocab.json", json.dumps(vocabulary, ensure_ascii=False))
    files.write_text(folder / "merges.txt", "\n".join(lines) + "\n")
    files.write_json(folder / "tokenizer_config.json", config)


def networks(seed: int = 0) -> dict[str, torch.nn.Module]:
    """Return random networks with the architecture of the tiny model, by part."""
    torch.manual_seed(seed)
    kinds = {"unet": UNet, "vae": AutoencoderKL, "text_encoder": TextEncoder}
    parts = {part: kind(config_json.read(HERE / part, part)) for part, kind in kinds.items()}
    for table in parts["text_encoder"].text_model.embeddings.children():
        torch.nn.init.normal_(table.weight, std=0.02)  # as in CLIP
    return parts


def write(out: Path, data: Path, seed: int = 0) -> None:
    """Write the whole model to the folder `out`, in the diffusers layout."""
    parts = networks(seed)
    text: TextConfig = parts["text_encoder"].config
    assert text.vocab_size == VOCABULARY
    write_tokenizer(out / "tokenizer", count_words(data))
    pipeline = PipelineParts(
        **parts,
        scheduler=reading.read_json(HERE / "scheduler" / "scheduler_config.json"),
        tokenizer=out / "tokenizer",
        pipeline_class=PIPELINES[parts["unet"].config.in_channels],
    )
    diffusers.save(out, pipeline)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m minisd.tiny.init", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--data", type=Path, required=True, help="folder written by minisd.tiny.data")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights")
    o = parser.parse_args()
    write(o.out, o.data, o.seed)


if __name__ == "__main__":
    cli.run("minisd.tiny.init", main)
