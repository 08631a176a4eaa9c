"""Option groups shared by the methods. Standard library only, so that `--help` answers at once.

A group is a keyword-only dataclass; the first line of its docstring is its title in `--help`. A method's
Options inherits the groups it uses, adds its own flags, and may redeclare a field to change only its default:

    class Options(Training):
        rank: Count = flag(4, "rank r of the update B @ A")
        learning_rate: float = flag(1e-4)  # help, bounds and group stay those of Optimizer.learning_rate
"""

import os
from collections.abc import Collection
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, dataclass_transform, get_args

from minisd import registry
from minisd.spelling import bytes_in

TINY = registry.HERE / "tiny"  # the tiny model that comes with the package
MAX_PIXELS = 89_478_485  # of an image that is read: Pillow's own limit
MAX_IMAGES = 1_000_000  # in an update of one process
MAX_LENGTH = 50_000  # characters of a prompt or a caption

# Types with bounds: what holds for a value that is not None, and is false for NaN, and what it "must".
Count = Annotated[int, lambda n: n > 0, "be positive"]
Number = Annotated[int, lambda n: n >= 0, "not be negative"]
Side = Annotated[int, lambda n: n > 0 and n % 8 == 0, "be a positive multiple of 8"]
Positive = Annotated[float, lambda x: x > 0, "be positive"]
Weight = Annotated[float, lambda x: x >= 0, "not be negative"]
Rate = Annotated[float, lambda x: 0 <= x < 1, "be from 0 to below 1"]
Probability = Annotated[float, lambda x: 0 <= x <= 1, "be from 0 to 1"]
Memory = Annotated[str, bytes_in, "be an amount such as 8GB or 800MB"]


def flag(default: Any = MISSING, help: str | None = None, also: tuple[str, ...] = (), **metadata: Any) -> Any:
    """A dataclass field that is a command-line flag, required if it has no default. `also` are further
    spellings. In `metadata`, `free=True` allows a resumed run to change the flag, `refused=True` makes every
    use of it an error, `code=True` takes it from the command line alone, and `infotext` is its key in the
    parameters of an image."""
    if help:
        metadata |= {"help": help, "also": also}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def default_of(f: Field) -> object:
    return f.default if f.default_factory is MISSING else f.default_factory()


def free_flags(cls: type) -> set[str]:
    """The flags that an Options class, or a group it inherits from, declares as `free`."""
    return {f.name for f in fields(cls) if f.metadata.get("free")}


def require(condition: bool, message: str) -> None:
    """ValueError with this message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def check_text(text: str, what: str) -> None:
    """ValueError if a text, which `what` names, would take minutes to encode, or was read from no UTF-8."""
    require(len(text) <= MAX_LENGTH, f"{what} of {len(text):,} characters; at most {MAX_LENGTH:,} are read")
    require(text.encode(errors="replace").decode() == text, f"{what} not in UTF-8: {text[:100]!r}")


@dataclass_transform(kw_only_default=True, field_specifiers=(flag,))
@dataclass(kw_only=True)
class Group:
    """Base of every group, which makes a dataclass of it. After construction the bounds of each flag are
    checked, then NEEDS and EXCLUDES, and then the `check` of each class in the MRO runs, subclasses first."""

    NEEDS = {}  # those that need a flag, by its name, with blanks between them
    EXCLUDES = {}  # those that a flag excludes, likewise

    def __init_subclass__(cls):
        for name, f in vars(cls).items():
            if isinstance(f, Field):  # what it does not say itself is as in the nearest base
                known = (getattr(base, "__dataclass_fields__", {}).get(name) for base in cls.__mro__[1:])
                inherited = next((f.metadata for f in known if f), {})
                hint = cls.__annotations__[name]  # a type, or with None a union
                bounds = [h.__metadata__ for h in (hint, *get_args(hint)) if hasattr(h, "__metadata__")]
                own = {"bounds": bounds[0]} if bounds else {}
                f.metadata = MappingProxyType({**inherited, **f.metadata, **own})
        dataclass(kw_only=True)(cls)

    def __post_init__(self):
        for f in fields(self):
            value, about = getattr(self, f.name), f.metadata
            require(not (value and about.get("refused")), f"--{f.name} is {about.get('help')}")
            if value is not None and "bounds" in about:
                holds, words = about["bounds"]
                require(holds(value), f"--{f.name} must {words}")
        given = [f.name for f in fields(self) if self.is_given(f.name)]
        for name, one in self.excluded(given).items():
            require(name not in given, f"--{one} and --{name} exclude each other")
        for cls in type(self).__mro__:
            for other, names in vars(cls).get("NEEDS", {}).items():
                lacking = getattr(self, other) in (None, False, [])
                for name in filter(self.is_given, names.split() if lacking else ()):
                    raise ValueError(f"--{name} needs --{other}")
            if "check" in cls.__dict__:
                cls.check(self)

    @classmethod
    def excluded(cls, given: Collection[str]) -> dict[str, str]:
        """The flags that the given ones exclude, each with the one that does."""
        pairs = [pair for c in cls.__mro__ for pair in vars(c).get("EXCLUDES", {}).items()]
        return {name: one for one, names in pairs if one in given for name in names.split()}

    def is_given(self, name: str) -> bool:
        """Whether a flag is not at its default."""
        return getattr(self, name) != default_of(self.__dataclass_fields__[name])


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

    EXCLUDES = {"overwrite_output_dir": "resume_from_checkpoint"}
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
    max_train_steps: Count | None = flag(None, "optimizer updates, instead of epochs", free=True)
    num_train_epochs: Count = flag(
        100, "passes over the data, unless --max_train_steps is given", also=("num_epochs",), free=True
    )
    checkpointing_steps: Number = flag(500, "updates between checkpoints; 0 saves none", free=True)
    background_checkpoints: bool = flag(True, "write them from a copy, while training goes on", free=True)
    checkpoints_total_limit: Count | None = flag(None, "number of checkpoints to keep", free=True)
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
        require(self.seed >= 0, "--seed must not be negative: training never draws one, so that runs repeat")
        shown = self.report_to in ("wandb", "all") and self.hub_token
        require(not shown, "--hub_token would be visible on wandb: log in to the hub instead")


LR_SCHEDULERS = Literal[
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
]


class Optimizer(Group):
    """Optimizer"""

    NEEDS = {"optimizer": "optimizer_args"}
    EXCLUDES = {"optimizer": "use_8bit_adam adam_beta1 adam_beta2 adam_weight_decay adam_epsilon"}
    optimizer: str | None = flag(
        None, "a class instead of AdamW, such as torch.optim.SGD", also=("optimizer_type",), code=True
    )
    optimizer_args: list[str] = flag([], "arguments of --optimizer, NAME=VALUE, such as momentum=0.9")
    learning_rate: Positive = flag(1e-5, "peak learning rate")
    use_8bit_adam: bool = flag(False, "keep AdamW's state in 8 bits, with bitsandbytes")
    scale_lr: bool = flag(False, "multiply the learning rate by the number of images per update")
    lr_scheduler: LR_SCHEDULERS = flag("constant", "learning rate schedule, counted in updates")
    lr_warmup_steps: Number | None = flag(
        None, "updates of linear warm-up; by default 500, or 0 with constant"
    )
    lr_num_cycles: Count = flag(1, "number of restarts of cosine_with_restarts")
    lr_power: float = flag(1.0, "exponent of polynomial")
    train_batch_size: Count = flag(4, "images in one forward pass on one device")
    gradient_accumulation_steps: Count = flag(1, "forward passes per update")
    adam_beta1: Rate = flag(0.9, "AdamW's beta1")
    adam_beta2: Rate = flag(0.999, "AdamW's beta2")
    adam_weight_decay: Weight = flag(1e-2, "AdamW's weight decay")
    adam_epsilon: Weight = flag(1e-8, "AdamW's epsilon")
    max_grad_norm: Weight = flag(1.0, "clip the gradient's norm to this; 0 disables clipping")

    def check(self):
        images = self.train_batch_size * self.gradient_accumulation_steps
        problem = f"{images:,} images in an update, by --train_batch_size and --gradient_accumulation_steps"
        require(images <= MAX_IMAGES, f"{problem}; at most {MAX_IMAGES:,} are taken")
        if self.lr_warmup_steps is None:
            self.lr_warmup_steps = 0 if self.lr_scheduler == "constant" else 500
        elif self.lr_warmup_steps and self.lr_scheduler == "constant":
            print("--lr_scheduler constant has no warm-up: --lr_warmup_steps needs constant_with_warmup")


class Diffusion(Group):
    """Noise and loss"""

    snr_gamma: Positive | None = flag(None, "gamma of min-SNR loss weighting; 5 is usual")
    noise_offset: float = flag(0.0, "scale of added noise that is constant over an image; 0.1 is usual")
    input_perturbation: float = flag(0.0, "scale of noise added to the input only; 0.1 is usual")
    prediction_type: Literal["epsilon", "v_prediction"] | None = flag(
        None, "what the network predicts; by default what the model's scheduler says"
    )
    rescale_betas_zero_snr: bool = flag(False, "train down to zero SNR; needs v_prediction")


KERNELS = Literal["auto", "triton", "torch"]
PRECISIONS = Literal["no", "fp16", "bf16"]
GRAPH = Literal["auto", "on", "off"]


class Precision(Group):
    """Speed and memory"""

    NEEDS = {"plan": "memory"}
    EXCLUDES = {"shard": "plan compile optimizer use_8bit_adam"}
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
    reduce_dtype: Literal["fp32", "bf16"] = flag("fp32", "precision in which processes sum their gradients")
    shard: Literal["fsdp"] | None = flag(None, "keep a part of what trains in each process", free=True)
    gradient_checkpointing: bool = flag(False, "recompute activations in the backward pass to save memory")
    plan: bool = flag(
        False, "report what memory an update takes, and train nothing; --device cuda needs no GPU", free=True
    )
    memory: Memory | None = flag(None, "find the flags that fit into this, such as 8GB", free=True)
    allow_tf32: bool = flag(False, "allow TF32 in fp32 matrix products")
    enable_xformers_memory_efficient_attention: bool = flag(False, "accepted: scores are never stored")
    set_grads_to_none: bool = flag(False, "accepted: gradients are always set to None")
    dataloader_num_workers: Number = flag(0, "processes that load images; 0 is the main process", free=True)

    def check(self):
        require(self.dataloader_num_workers <= 1024, "--dataloader_num_workers must be at most 1024")
        self.mixed_precision = self.mixed_precision or "no"


class Data(Group):
    """Data"""

    SUBFOLDERS = "all"  # which are read: see data/source.py

    data: Path = flag(help="folder of training images", also=("train_data_dir", "instance_data_dir"))
    resolution: Side = flag(512, "side of the training images in pixels, a multiple of 8")
    center_crop: bool = flag(False, "crop images to the central square first")
    skip_bad_images: bool = flag(False, "decode all images at the start, and leave out those that fail")
    check_data: bool = flag(False, "decode all images, report on them and the captions, and stop", free=True)
    allow_outside: bool = flag(False, "read images that metadata names outside its folder", free=True)
    max_pixels: Count = flag(MAX_PIXELS, "refuse images with more pixels than this", free=True)


class Dataset(Data):
    """Data with columns"""

    DATA_HAS_SPLITS = False  # whether names in --data tell splits apart, as always in --dataset_name

    data: Path | None = flag(None)
    dataset_name: str | None = flag(
        None, "dataset on the hub, a folder or a parquet file; --data is then a folder in it"
    )
    dataset_config_name: str | None = flag(None, "configuration of --dataset_name")
    max_train_samples: Count | None = flag(None, "use only this many examples, drawn by --seed")
    validation_split: float = flag(
        0.0,
        "fraction (below 1) or number (from 1) of examples to hold out; their loss is logged at every "
        "validation, each with a fixed noise and timestep",
    )

    def check(self):
        split = self.validation_split
        require(0 <= split < 1 or split == int(split) > 0, "--validation_split must be below 1, or whole")
        require(bool(self.data or self.dataset_name), "give --data or --dataset_name")


INTERPOLATIONS = Literal["nearest", "nearest_exact", "box", "bilinear", "hamming", "bicubic", "lanczos"]


class Captions(Dataset):
    """Captioned data"""

    NEEDS = {"train_text_encoder": "text_encoder_lr", "shuffle_caption": "keep_tokens"}
    image_column: str = flag("image", "column of the images")
    caption_column: str = flag("text", "column of the captions; of several, one is drawn each time")
    random_flip: bool = flag(False, "flip images with probability 1/2")
    image_interpolation_mode: INTERPOLATIONS = flag("lanczos", "how to resize")
    caption_dropout: Probability = flag(0.0, "probability of an empty caption; guidance needs some")
    shuffle_caption: bool = flag(False, "shuffle the parts of a caption, between commas, each time")
    keep_tokens: Number = flag(0, "number of parts that --shuffle_caption leaves at the beginning")
    train_text_encoder: bool = flag(False, "train the text encoder as well")
    text_encoder_lr: Positive | None = flag(
        None, "peak learning rate of the text encoder; by default --learning_rate"
    )
    bucket: bool = flag(False, "batch by aspect ratio instead of cropping to squares")
    masked_loss: bool = flag(False, "count the error where masks are white, not black; column mask_file_name")
    alpha_mask: bool = flag(False, "count the error where images are not transparent, unless they have masks")


class Average(Group):
    """Averaged weights"""

    NEEDS = {"ema_warmup": "ema_inv_gamma ema_power"}
    use_ema: bool = flag(False, "average the weights over the updates, and save the average")
    ema_max_decay: Probability = flag(0.9999, "upper limit of the decay")
    ema_warmup: bool = flag(False, "decay 1 - (1 + step / inv_gamma)^-power, not (1 + step) / (10 + step)")
    ema_inv_gamma: float = flag(1.0, "inv_gamma of --ema_warmup")
    ema_power: float = flag(0.75, "power of --ema_warmup")
    offload_ema: bool = flag(False, "keep the average in CPU memory")
    foreach_ema: bool = flag(False, "accepted: the average is always updated for all tensors at once")


class ValidationImages(Group):
    """Validation"""

    num_validation_images: Count = flag(4, "number of validation images", free=True)
    validation_steps: Count | None = flag(100, "updates between validations", free=True)
    validation_epochs: Count | None = flag(None, "epochs between validations, instead of updates", free=True)

    def check(self):
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
    latents_memory: Weight = flag(8.0, "GB of latents in memory; more are in --output_dir", free=True)

    def check(self):
        require(self.cache_latents or not self.latents_dir, "--latents_dir is for --cache_latents")
        if place := self.latents_dir:
            there = next(p for p in (place, *place.parents) if os.path.lexists(p))
            require(there.is_dir(), f"--latents_dir {place}: {there} is not a folder")
        used = self.cache_latents and not self.latents_dir
        require(used or not self.is_given("latents_memory"), "--latents_memory is for latents in memory")
