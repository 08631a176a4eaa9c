"""Build the four files of minisd/tokenizer/ from the merges of OpenAI's CLIP. Run once; kept for reference.

    pip download --no-deps open-clip-torch && unzip open_clip_torch-*.whl
    python -m minisd.tiny.clip_vocabulary open_clip/bpe_simple_vocab_16e6.txt.gz

The vocabulary is 256 bytes, the same 256 at the end of a word, one entry for each of the first 48,894 merges,
and markers for the start and the end of a text: 49,408 entries (Radford et al. 2021, arXiv 2103.00020).
"""

import gzip
import json
import sys

from minisd.formats.parts import TOKENIZER
from minisd.models.tokenizer import END, START

MERGES = 48_894


def byte_names() -> list[str]:
    """Return a visible character for each byte, in the vocabulary's order: printable Latin-1 bytes first."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = 256 - len(visible)
    return [chr(b) for b in visible] + [chr(256 + i) for i in range(hidden)]


def main(source: str) -> None:
    lines = gzip.open(source, "rt", encoding="utf-8").read().split("\n")
    merges = lines[1 : 1 + MERGES]  # the first line is a version
    singles = byte_names()
    entries = [*singles, *(c + "</w>" for c in singles), *(m.replace(" ", "") for m in merges), START, END]
    vocabulary = {entry: i for i, entry in enumerate(entries)}
    assert len(vocabulary) == len(entries) == 49_408

    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, **special}
    files = {
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False, separators=(",", ":")),
        "merges.txt": "\n".join(["#version: 0.2", *merges]),
        "special_tokens_map.json": json.dumps(special, indent=2),
        "tokenizer_config.json": json.dumps(config, indent=2),
    }
    for name, text in files.items():
        (TOKENIZER / name).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
