"""LoRAs and other adapters for the tests: models that carry them, and files in everybody's format."""

import copy
import math
from functools import cache

import torch
from safetensors.torch import save_file

from minisd.adapters import custom_diffusion, lora
from minisd.formats import parts, single_file
from minisd.sampling.generate import Settings, pictures
from minisd.sampling.stable_diffusion import StableDiffusion

ALL = ["attention", "feed_forward", "projections", "resnet"]
PROMPT = "a photo of a cat"


@cache
def loaded(folder) -> StableDiffusion:
    return StableDiffusion.load(folder)


def fresh(folder) -> StableDiffusion:
    """The model as it is on the disk; its tokenizer, which takes longest to load, is shared."""
    sd = loaded(folder)
    networks = (copy.deepcopy(sd.unet), sd.vae, copy.deepcopy(sd.text_encoder))
    return StableDiffusion(*networks, sd.tokenizer, sd.scheduler, sd.name)


def randomised(updates, seed=0, size=0.2):
    """Updates as if trained: B is no longer zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for update in updates.values():
            update.lora_A.copy_(torch.randn(update.lora_A.shape, generator=generator) / update.rank)
            update.lora_B.copy_(size * torch.randn(update.lora_B.shape, generator=generator))
    return updates


def new(model, targets=ALL, rank=4, alpha=2.0, seed=0):
    """Trained updates, and the model that carries them."""
    sd = fresh(model)
    return sd, randomised(lora.insert(lora.networks(sd), targets, rank, alpha), seed)


@torch.no_grad()
def outputs(sd):
    """Context and prediction: everything a LoRA can change."""
    generator = torch.Generator().manual_seed(5)
    context = sd.encode_text([PROMPT, "x"])
    x = torch.randn(2, 4, 8, 8, generator=generator).to(context.dtype)
    return context, sd.unet(x, torch.tensor([3, 700]), context)


def close(a, b, tolerance=1e-5):
    return all((x - y).abs().max() <= tolerance * y.abs().max() for x, y in zip(a, b, strict=True))


def weights(sd):
    """What the networks amount to: the weights with all updates in them."""
    return lora.merged(lora.networks(sd))


def with_weights(model, weights):
    """The model with all of its weights replaced."""
    sd = fresh(model)
    lora.networks(sd).load_state_dict(weights)
    return sd


def same_weights(a, b, tolerance=1e-6):
    return a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=tolerance, rtol=0) for k in a)


def draw(sd, prompt=PROMPT):
    return next(pictures(sd, [prompt], [3], Settings(width=32, height=32, steps=2)))


@cache
def draw_plain(model):
    return draw(fresh(model))


def draw_with(pipe, prompt=PROMPT):
    """The same with diffusers."""
    return pipe(
        prompt, width=32, height=32, num_inference_steps=2, guidance_scale=7.5,
        generator=torch.Generator().manual_seed(3),
    ).images[0]  # fmt: skip


# --- Files ---


def peft_adapters(pipe, rank=3, alpha=6, **kwargs):
    """LoRAs of PEFT in both networks of a pipeline, as the field's script inserts them, with random B."""
    from peft import LoraConfig

    torch.manual_seed(1)
    common = {"r": rank, "lora_alpha": alpha, "init_lora_weights": "gaussian", **kwargs}
    pipe.unet.add_adapter(LoraConfig(target_modules=["to_k", "to_q", "to_v", "to_out.0"], **common))
    pipe.text_encoder.add_adapter(
        LoraConfig(target_modules=["q_proj", "k_proj", "v_proj", "out_proj"], **common)
    )
    for part in (pipe.unet, pipe.text_encoder):
        for name, p in part.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.2)
            if "magnitude" in name:
                p.data.mul_(1 + 0.1 * torch.rand_like(p))


def save_peft(pipe, folder, metadata: bool):
    from diffusers import StableDiffusionPipeline
    from diffusers.training_utils import _collate_lora_metadata
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    parts = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    layers = {
        f"{n}_lora_layers": convert_state_dict_to_diffusers(get_peft_model_state_dict(m))
        for n, m in parts.items()
    }
    about = _collate_lora_metadata(parts) if metadata else {}
    StableDiffusionPipeline.save_lora_weights(folder, **layers, **about)


ATTENTION = {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out.0": "to_out"}
PROJECTIONS = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


def unet_key(generation, path, which):
    attention, _, last = path.partition(".to_")
    old = f"{attention}.processor.{ATTENTION[f'to_{last}']}_lora.{which}.weight"
    peft = {"down": "lora_A", "up": "lora_B"}[which]
    return {
        "g0": old, "g1": f"unet.{old}", "g2": f"unet.{old}", "g3": f"unet.{old}",
        "g4": f"unet.{path}.lora.{which}.weight", "peft": f"unet.{path}.{peft}.weight",
        "bare": f"unet.{path}.lora.{which}.weight", "folder": f"base_model.model.{path}.{peft}.weight",
        "lcm": f"unet.base_model.model.{path}.{peft}.weight",
        "kohya": f"lora_unet_{path.replace('.', '_')}.lora_{which}.weight",
        "te1": f"lora_unet_{path.replace('.', '_')}.lora_{which}.weight",
    }[generation]  # fmt: skip


def text_key(generation, path, which):
    attention, _, last = path.rpartition(".")
    peft = {"down": "lora_A", "up": "lora_B"}[which]
    flat = path.replace(".", "_")
    return {
        "g1": f"text_encoder.{path}.to_q_lora.{which}.weight",
        "g2": f"text_encoder.{attention}.{PROJECTIONS[last]}_lora.{which}.weight",
        "g3": f"text_encoder.{path}.lora_linear_layer.{which}.weight",
        "g4": f"text_encoder.{path}.lora_linear_layer.{which}.weight",
        "peft": f"text_encoder.{path}.{peft}.weight",
        "bare": f"text_encoder.{path.removeprefix('text_model.')}.lora_linear_layer.{which}.weight",
        "folder": f"base_model.model.{path}.{peft}.weight",
        "lcm": f"text_encoder.base_model.model.{path}.{peft}.weight",
        "kohya": f"lora_te_{flat}.lora_{which}.weight", "te1": f"lora_te1_{flat}.lora_{which}.weight",
    }[generation]  # fmt: skip


def named(updates, generation):
    """The tensors of updates by the names of a generation of files."""
    tensors = {}
    for name, update in updates.items():
        part, _, path = name.partition(".")
        key = unet_key if part == "unet" else text_key
        tensors[key(generation, path, "down")] = update.lora_A.detach().clone()
        tensors[key(generation, path, "up")] = update.lora_B.detach().clone()
    return tensors


def relatives(kind, weight, generator):
    """Tensors of a relative of LoRA for a weight, and what they add to it, written out by itself."""

    def rand(*shape):
        return torch.randn(shape, generator=generator) * 0.3

    o, i, *k = weight.shape
    n = math.prod(k)
    r, alpha = 3, 2.0
    t = {"alpha": torch.tensor(alpha)}
    if kind == "locon":
        t |= {"lora_down.weight": rand(r, i, *k), "lora_up.weight": rand(o, r, *[1] * len(k))}
        up, down = t["lora_up.weight"].view(o, r), t["lora_down.weight"].view(r, i * n)
        return t, sum(torch.outer(up[:, j], down[j]) for j in range(r)).view_as(weight) * alpha / r
    if kind == "tucker":
        t |= {
            "lora_down.weight": rand(r, i, 1, 1),
            "lora_up.weight": rand(o, r, 1, 1),
            "lora_mid.weight": rand(r, r, *k),
        }
        mid = t["lora_mid.weight"].permute(2, 3, 0, 1)  # (k, k, r, r)
        delta = t["lora_up.weight"].view(o, r) @ mid @ t["lora_down.weight"].view(r, i)
        return t, delta.permute(2, 3, 0, 1) * alpha / r
    if kind == "loha":
        t |= {f"hada_w{j}_a": rand(o, r) for j in "12"} | {f"hada_w{j}_b": rand(r, i * n) for j in "12"}
        return t, ((t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])).view_as(
            weight
        ) * alpha / r
    if kind == "lokr":
        t |= {"lokr_w1": rand(4, 2), "lokr_w2_a": rand(o // 4, r), "lokr_w2_b": rand(r, i // 2 * n)}
        w2 = (t["lokr_w2_a"] @ t["lokr_w2_b"]).view(o // 4, i // 2, *k)
        rows = [torch.cat([t["lokr_w1"][a, b] * w2 for b in range(2)], dim=1) for a in range(4)]
        return t, torch.cat(rows) * alpha / r
    if kind == "lokr_full":
        t |= {"lokr_w1": rand(4, 2), "lokr_w2": rand(o // 4, i // 2, *k)}
        rows = [torch.cat([t["lokr_w1"][a, b] * t["lokr_w2"] for b in range(2)], dim=1) for a in range(4)]
        return t, torch.cat(rows)
    axis = {"dora_out": 0, "dora_in": 1}[kind]
    plain, delta = relatives("locon", weight, generator)
    shape = [1] * weight.ndim
    shape[axis] = weight.shape[axis]
    scale = rand(*shape).abs() + 0.5
    changed = weight + delta
    norm = changed.transpose(0, axis).flatten(1).norm(dim=1).view(shape)
    return plain | {"dora_scale": scale}, changed / norm * scale - weight


def custom(name, model, folder):
    """Custom Diffusion's matrices in diffusers' form and in its authors' two, one of them compressed."""
    generator, deltas, sd = torch.Generator().manual_seed(2), {}, fresh(model)
    projections = [n for n in lora.layers(sd.unet) if ".attn2." in n]
    ends = (".to_k", ".to_v") if name != "custom.safetensors" else (".to_k", ".to_v", ".to_q", ".to_out.0")
    for layer in projections:
        if layer.endswith(ends):
            shape = sd.unet.get_submodule(layer).weight.shape
            u, v = (torch.randn(s, generator=generator) for s in ((shape[0], 3), (3, shape[1])))
            deltas[f"{layer}.weight"] = 0.2 * u @ v
            if layer.endswith("to_out.0"):
                deltas[f"{layer}.bias"] = torch.randn(shape[0], generator=generator)
    changed = {k: sd.unet.state_dict()[k] + d for k, d in deltas.items()}
    word = torch.randn(32, generator=generator)
    if name.startswith("custom"):
        theirs = {f"{custom_diffusion.stem(k.rpartition('.')[0])}.{k.rpartition('.')[2]}": v
                  for k, v in changed.items()}  # fmt: skip
        if name.endswith("safetensors"):
            save_file(theirs, folder / name)
        else:
            torch.save(
                theirs | {"mid_block.attentions.0.transformer_blocks.0.attn1.processor": {}}, folder / name
            )
    elif name == "delta.bin":
        torch.save({"unet": changed, "modifier_token": {"<new1>": word}}, folder / name)
    elif name == "compressed.bin":
        factors = {}
        for k, delta in deltas.items():
            u, s, v = torch.linalg.svd(delta, full_matrices=False)
            factors[k] = {"u": (u * s)[:, :3], "v": v[:3]}
        torch.save({"unet": factors, "modifier_token": {"<new1>": word}}, folder / name)
    else:
        table = single_file.table("unet", parts.build("unet", sd.unet.config, "x"))
        theirs = {table[k]: v for k, v in changed.items()}
        torch.save({"state_dict": theirs | {"embed": word[None]}}, folder / "delta.bin")
    return {f"unet.{k}": delta for k, delta in deltas.items()}
