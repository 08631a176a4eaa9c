"""Option groups shared by the methods. Standard library only, so that `--help` answers at once.

A group is a keyword-only dataclass; the first line of its docstring is its title in `--help`. A method's
Options inherits the groups it uses, adds its own flags, and may redeclare a field to change only its default:

    class Options(Training):
        rank: int = flag(4, "rank r of the update B @ A")
        learning_rate: float = flag(1e-4)       # help and group stay those of Optimizer.learning_rate
"""

import os
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, dataclass_transform

from minisd import registry

TINY = registry.HERE / "tiny"  # the tiny model that comes with the package
MAX_PIXELS = 89_478_485  # of an image that is read: Pillow's own limit
MAX_IMAGES = 1_000_000  # in an update of one process
MAX_LENGTH = 50_000  # characters of a prompt or a caption


def flag(default: Any = MISSING, help: str | None = None, also: tuple[str, ...] = (), **metadata: Any) -> Any:
    """A dataclass field that is a command-line flag, required if it has no default. `also` are further
    spellings. In `metadata`, `free=True` allows a resumed run to change the flag, `refused=True` makes every
    use of it an error, and `infotext` is its key in the parameters of an image."""
    if help:
        metadata |= {"help": help, "also": also}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def default_of(f: Field) -> object:
    """A flag's default."""
    return f.default if f.default_factory is MISSING else f.default_factory()


def free_flags(cls: type) -> set[str]:
    """The flags that an Options class, or a group it inherits from, declares as `free`."""
    declared = [f for c in cls.__mro__ for f in c.__dict__.get("__dataclass_fields__", {}).values()]
    return {f.name for f in declared if f.metadata.get("free")}


def require(condition: bool, message: str) -> None:
    """ValueError with this message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def check_length(text: str, what: str) -> None:
    """ValueError if a prompt or a caption, which `what` names, is so long that it takes minutes to encode."""
    problem = f"{what} of {len(text):,} characters; at most {MAX_LENGTH:,} are read"
    require(len(text) <= MAX_LENGTH, problem)


@dataclass_transform(kw_only_default=True, field_specifiers=(flag,))
@dataclass(kw_only=True)
class Group:
    """Base of every group, which makes a dataclass of it. After construction the `check` of each class in the
    MRO runs, subclasses first."""

    def __init_subclass__(cls):
        dataclass(kw_only=True)(cls)

    def __post_init__(self):
        for f in fields(self):
            refused = f.metadata.get("refused") and getattr(self, f.name)
            require(not refused, f"--{f.name} is {f.metadata.get('help')}")
        for cls in type(self).__mro__:
            if "check" in cls.__dict__:
                cls.check(self)

    def positive(self, *names: str) -> None:
        """ValueError if one of these flags is given and not above 0."""
        for name in names:
            require(getattr(self, name) is None or getattr(self, name) > 0, f"--{name} must be positive")

    def not_negative(self, *names: str) -> None:
        """ValueError if one of these flags is below 0."""
        for name in names:
            require(getattr(self, name) >= 0, f"--{name} must not be negative")

    def probabilities(self, *names: str) -> None:
        """ValueError if one of these flags is not from 0 to 1."""
        for name in names:
            require(0 <= getattr(self, name) <= 1, f"--{name} must be from 0 to 1")

    def check_resolution(self) -> None:
        """ValueError unless the VAE can encode images of --resolution."""
        require(self.resolution > 0 and self.resolution % 8 == 0, "--resolution must be a multiple of 8")

    def exclusive(self, one: str, other: str) -> None:
        """ValueError if both flags are given."""
        both = getattr(self, one) and getattr(self, other)
        require(not both, f"--{one} and --{other} exclude each other")


class Model(Group):
    """Model"""

    model: str | None = flag(
        None,
        "a folder in the diffusers layout, a .safetensors or .ckpt file with CompVis names, or a hub id; "
        "by default the tiny model that comes with minisd, with defaults of its own",
        also=("pretrained_model_name_or_path",),
        infotext="Model path",
    )
    revision: str | None = flag(None, "branch, tag or commit of a hub id")
    variant: str | None = flag(None, "load the files of this variant, such as fp16 or non_ema")
    load_ema: bool = flag(False, "load the averaged weights of a single file that has both")
    tokenizer_name: str | None = flag(None, "folder of another tokenizer")
    cache_dir: str | None = flag(None, "folder for downloads from the hub", free=True, infotext=None)

    def loading(self) -> dict[str, Any]:
        """The flags as keywords of StableDiffusion.load."""
        names = {"ema": "load_ema", "tokenizer": "tokenizer_name"}
        names |= {name: name for name in ("revision", "variant", "cache_dir")}
        return {keyword: getattr(self, name) for keyword, name in names.items()}


class Run(Group):
    """Run"""

    FEWEST = 1000  # updates, below which hardly anything is learned, but on the tiny model (docs/recipes.md)

    output_dir: Path = flag(Path("out"), "folder for log, checkpoints and result", free=True)
    overwrite_output_dir: bool = flag(
        False, "discard an earlier run and its result, and start over", also=("overwrite",), free=True
    )
    preset: str | None = flag(
        None,
        "flags for a purpose: face, object, style or quick, as far as the method has them; others have "
        "priority (docs/recipes.md)",
        free=True,
    )
    seed: int = flag(0, "seed of everything random")
    max_train_steps: int | None = flag(None, "optimizer updates, instead of epochs", free=True)
    num_train_epochs: int = flag(
        100, "passes over the data, unless --max_train_steps is given", also=("num_epochs",), free=True
    )
    checkpointing_steps: int = flag(500, "updates between checkpoints; 0 saves none", free=True)
    checkpoints_total_limit: int | None = flag(None, "number of checkpoints to keep", free=True)
    resume_from_checkpoint: str | None = flag(None, "checkpoint folder, or 'latest'", free=True)
    report_to: Literal["none", "tensorboard", "wandb", "comet_ml", "all"] = flag(
        "tensorboard",
        "tracker to log to besides log.jsonl, if installed; comet_ml is not supported",
        also=("logger",),
        free=True,
    )
    logging_dir: str = flag("logs", "tensorboard's folder within --output_dir", free=True)
    push_to_hub: bool = flag(False, "upload the result to the hub", free=True)
    hub_model_id: str | None = flag(None, "repository on the hub; by default the folder's name", free=True)
    hub_private_repo: bool = flag(False, "make the repository private", free=True)
    hub_token: str | None = flag(None, "token for the hub; by default the saved one", free=True)
    local_rank: int = flag(-1, "accepted: the environment's LOCAL_RANK counts", free=True)

    def check(self):
        self.positive("max_train_steps", "num_train_epochs", "checkpoints_total_limit")
        self.not_negative("checkpointing_steps")
        require(self.seed >= 0, "--seed must not be negative: training never draws one, so that runs repeat")
        self.exclusive("overwrite_output_dir", "resume_from_checkpoint")
        shown = self.report_to in ("wandb", "all") and self.hub_token
        require(not shown, "--hub_token would be visible on wandb: log in to the hub instead")


LR_SCHEDULERS = Literal[
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
]


class Optimizer(Group):
    """Optimizer"""

    learning_rate: float = flag(1e-5, "peak learning rate")
    use_8bit_adam: bool = flag(False, "keep AdamW's state in 8 bits, with bitsandbytes")
    scale_lr: bool = flag(False, "multiply the learning rate by the number of images per update")
    lr_scheduler: LR_SCHEDULERS = flag("constant", "learning rate schedule, counted in updates")
    lr_warmup_steps: int | None = flag(None, "updates of linear warm-up; by default 500, or 0 with constant")
    lr_num_cycles: int = flag(1, "number of restarts of cosine_with_restarts")
    lr_power: float = flag(1.0, "exponent of polynomial")
    train_batch_size: int = flag(4, "images in one forward pass on one device")
    gradient_accumulation_steps: int = flag(1, "forward passes per update")
    adam_beta1: float = flag(0.9, "AdamW's beta1")
    adam_beta2: float = flag(0.999, "AdamW's beta2")
    adam_weight_decay: float = flag(1e-2, "AdamW's weight decay")
    adam_epsilon: float = flag(1e-8, "AdamW's epsilon")
    max_grad_norm: float = flag(1.0, "clip the gradient's norm to this; 0 disables clipping")

    def check(self):
        self.positive("learning_rate", "train_batch_size", "gradient_accumulation_steps", "lr_num_cycles")
        images = self.train_batch_size * self.gradient_accumulation_steps
        problem = f"{images:,} images in an update, by --train_batch_size and --gradient_accumulation_steps"
        require(images <= MAX_IMAGES, f"{problem}; at most {MAX_IMAGES:,} are taken")
        if self.lr_warmup_steps is None:
            self.lr_warmup_steps = 0 if self.lr_scheduler == "constant" else 500
        elif self.lr_warmup_steps and self.lr_scheduler == "constant":
            print("--lr_scheduler constant has no warm-up: --lr_warmup_steps needs constant_with_warmup")
        self.not_negative("lr_warmup_steps", "max_grad_norm", "adam_weight_decay")


class Diffusion(Group):
    """Noise and loss"""

    snr_gamma: float | None = flag(None, "gamma of min-SNR loss weighting; 5 is usual")
    noise_offset: float = flag(0.0, "scale of added noise that is constant over an image; 0.1 is usual")
    input_perturbation: float = flag(0.0, "scale of noise added to the input only; 0.1 is usual")
    prediction_type: Literal["epsilon", "v_prediction"] | None = flag(
        None, "what the network predicts; by default what the model's scheduler says"
    )
    rescale_betas_zero_snr: bool = flag(False, "train down to zero SNR; needs v_prediction")

    def check(self):
        self.positive("snr_gamma")


KERNELS = Literal["auto", "triton", "torch"]
PRECISIONS = Literal["no", "fp16", "bf16"]
GRAPH = Literal["auto", "on", "off"]


class Precision(Group):
    """Speed and memory"""

    device: str | None = flag(None, "cuda, cpu, mps, ...; by default cuda if there is a GPU", free=True)
    kernels: KERNELS = flag("auto", "what computes attention and norms; auto: what is fastest", free=True)
    graph: GRAPH = flag("auto", "run updates as CUDA graphs; auto: where that gives the same bits", free=True)
    compile: bool = flag(False, "compile the UNet with torch.compile, which takes a minute")
    deterministic: bool = flag(
        False,
        "the same command gives the same bytes on the same GPU, if somewhat later; --kernels auto is then "
        "torch; not promised for the sums over several GPUs, nor with --use_8bit_adam",
    )
    mixed_precision: PRECISIONS | None = flag(
        None, "precision of frozen networks and autocast; by default that of accelerate launch, or no"
    )
    gradient_checkpointing: bool = flag(False, "recompute activations in the backward pass to save memory")
    allow_tf32: bool = flag(False, "allow TF32 in fp32 matrix products")
    enable_xformers_memory_efficient_attention: bool = flag(
        False, "accepted: attention never stores the whole score matrix"
    )
    set_grads_to_none: bool = flag(False, "accepted: gradients are always set to None")
    dataloader_num_workers: int = flag(0, "processes that load images; 0 is the main process", free=True)

    def check(self):
        self.not_negative("dataloader_num_workers")
        require(self.dataloader_num_workers <= 1024, "--dataloader_num_workers must be at most 1024")
        self.mixed_precision = self.mixed_precision or "no"


class Data(Group):
    """Data"""

    SUBFOLDERS = "all"  # which are read: see data/source.py

    data: Path = flag(help="folder of training images", also=("train_data_dir", "instance_data_dir"))
    resolution: int = flag(512, "side of the training images in pixels, a multiple of 8")
    center_crop: bool = flag(False, "crop images to the central square first")
    skip_bad_images: bool = flag(False, "decode all images at the start, and leave out those that fail")
    check_data: bool = flag(False, "decode all images, report on them and the captions, and stop", free=True)
    allow_outside: bool = flag(False, "read images that metadata names outside its folder", free=True)
    max_pixels: int = flag(MAX_PIXELS, "refuse images with more pixels than this", free=True)

    def check(self):
        self.check_resolution()
        self.positive("max_pixels")


class Dataset(Data):
    """Data with columns"""

    DATA_HAS_SPLITS = False  # whether names in --data tell splits apart, as always in --dataset_name

    data: Path | None = flag(None)
    dataset_name: str | None = flag(
        None, "dataset on the hub, a folder or a parquet file; --data is then a folder in it"
    )
    dataset_config_name: str | None = flag(None, "configuration of --dataset_name")
    max_train_samples: int | None = flag(None, "use only this many examples, drawn by --seed")
    validation_split: float = flag(
        0.0,
        "fraction (below 1) or number (from 1) of examples to hold out; their loss is logged at every "
        "validation, each with a fixed noise and timestep",
    )

    def check(self):
        split = self.validation_split
        require(0 <= split < 1 or split == int(split) > 0, "--validation_split must be below 1, or whole")
        require(bool(self.data or self.dataset_name), "give --data or --dataset_name")
        self.positive("max_train_samples")


INTERPOLATIONS = Literal["nearest", "nearest_exact", "box", "bilinear", "hamming", "bicubic", "lanczos"]


class Captions(Dataset):
    """Captioned data"""

    image_column: str = flag("image", "column of the images")
    caption_column: str = flag("text", "column of the captions; of several, one is drawn each time")
    random_flip: bool = flag(False, "flip images with probability 1/2")
    image_interpolation_mode: INTERPOLATIONS = flag("lanczos", "how to resize")
    caption_dropout: float = flag(0.0, "probability of an empty caption; guidance needs some")
    shuffle_caption: bool = flag(False, "shuffle the parts of a caption, between commas, each time")
    keep_tokens: int = flag(0, "number of parts that --shuffle_caption leaves at the beginning")
    train_text_encoder: bool = flag(False, "train the text encoder as well")
    text_encoder_lr: float | None = flag(
        None, "peak learning rate of the text encoder; by default --learning_rate"
    )
    bucket: bool = flag(False, "batch by aspect ratio instead of cropping to squares")

    def check(self):
        self.probabilities("caption_dropout")
        self.positive("text_encoder_lr")
        used = self.train_text_encoder or self.text_encoder_lr is None
        require(used, "--text_encoder_lr is for --train_text_encoder")
        self.not_negative("keep_tokens")
        require(self.shuffle_caption or not self.keep_tokens, "--keep_tokens is for --shuffle_caption")


class Average(Group):
    """Averaged weights"""

    use_ema: bool = flag(False, "average the weights over the updates, and save the average")
    ema_max_decay: float = flag(0.9999, "upper limit of the decay")
    ema_warmup: bool = flag(False, "decay 1 - (1 + step / inv_gamma)^-power, not (1 + step) / (10 + step)")
    ema_inv_gamma: float = flag(1.0, "inv_gamma of --ema_warmup")
    ema_power: float = flag(0.75, "power of --ema_warmup")
    offload_ema: bool = flag(False, "keep the average in CPU memory")
    foreach_ema: bool = flag(False, "accepted: the average is always updated for all tensors at once")

    def check(self):
        self.probabilities("ema_max_decay")


class ValidationImages(Group):
    """Validation"""

    num_validation_images: int = flag(4, "number of validation images", free=True)
    validation_steps: int | None = flag(100, "updates between validations", free=True)
    validation_epochs: int | None = flag(None, "epochs between validations, instead of updates", free=True)

    def check(self):
        self.positive("num_validation_images", "validation_steps", "validation_epochs")
        steps = self.validation_steps not in (None, type(self).validation_steps)
        epochs = self.validation_epochs not in (None, type(self).validation_epochs)
        require(not (steps and epochs), "--validation_steps and --validation_epochs exclude each other")
        if steps:  # a default does not count beside a flag that is given
            self.validation_epochs = None
        elif epochs:
            self.validation_steps = None

    def validation_interval(self, updates_per_epoch: int) -> int:
        """Number of updates between two validations."""
        return self.validation_steps or self.validation_epochs * updates_per_epoch


class Validation(ValidationImages):
    """Validation images"""

    validation_prompt: str | None = flag(
        None, "prompt of the validation images; {} in it stands for the trained concept", free=True
    )
    validation_guidance_scale: float = flag(7.5, "guidance scale of validation images")
    validation_scheduler: str = flag("ddim", "scheduler of validation images,", listing="schedulers")

    def check(self):
        name, kind = registry.find_scheduler(self.validation_scheduler)
        self.validation_scheduler = f"{name} {kind}" if kind else name


class Training(Data, Validation, Optimizer, Diffusion, Precision, Model, Run):
    """Latents"""  # and the groups of all methods that start from a Stable Diffusion model

    cache_latents: bool = flag(True, "encode every image only once, unless crops are random", free=True)
    latents_dir: Path | None = flag(None, "folder to keep latents in, for later runs as well", free=True)
    latents_memory: float = flag(8.0, "GB of latents in memory; more are in --output_dir", free=True)

    def check(self):
        self.not_negative("latents_memory")
        limited = self.latents_memory != type(self).latents_memory
        require(self.cache_latents or not self.latents_dir, "--latents_dir is for --cache_latents")
        if place := self.latents_dir:
            there = next(p for p in (place, *place.parents) if os.path.lexists(p))
            require(there.is_dir(), f"--latents_dir {place}: {there} is not a folder")
        used = self.cache_latents and not self.latents_dir
        require(used or not limited, "--latents_memory is for latents in memory")
