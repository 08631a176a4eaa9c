"""Option groups shared by the methods. Standard library only: this file is what `--help` costs.

A group is a keyword-only dataclass; its docstring's first line is the group's title in `--help`. A method's
Options inherits the groups it uses, adds its own flags, and may redeclare a field to change only its default:

    @dataclass(kw_only=True)
    class Options(Training):
        rank: int = flag(4, "rank r of the update B @ A")
        learning_rate: float = flag(1e-4)       # help and group stay those of Optimizer.learning_rate
"""

from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Literal

from minisd import registry

TINY = registry.HERE / "tiny"  # the model in the box: wherever that is, it is there


def flag(default=MISSING, help: str | None = None, also: tuple[str, ...] = (), **more):
    """A dataclass field that is a command-line flag too, `also` under other names. No default: required.
    `more` goes into the field's metadata, for those who read it (sampling/options.py)."""
    metadata = {"help": help, "also": also, **more} if help else {}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(kw_only=True)
class Group:
    """Base of every group: once constructed, each class of the MRO that has its own `check` runs it."""

    def __post_init__(self):
        for cls in type(self).__mro__:
            if "check" in cls.__dict__:
                cls.check(self)

    def positive(self, *names: str) -> None:
        """ValueError if one of these flags is given and not above 0."""
        for name in names:
            require(getattr(self, name) is None or getattr(self, name) > 0, f"--{name} must be positive")

    def chances(self, *names: str) -> None:
        """ValueError if one of these flags is not from 0 to 1."""
        for name in names:
            require(0 <= getattr(self, name) <= 1, f"--{name} must be from 0 to 1")


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(kw_only=True)
class Model(Group):
    """Model"""

    model: str | None = flag(
        None,
        "a folder in the diffusers layout, a .safetensors or .ckpt with CompVis names, or a hub id; "
        "without it the tiny model in the box, with defaults of its own",
        also=("pretrained_model_name_or_path",),
        infotext="Model path",
    )
    revision: str | None = flag(None, "branch, tag or commit of a hub id")
    variant: str | None = flag(None, "read the files of this variant, such as fp16 or non_ema")
    load_ema: bool = flag(False, "take the averaged weights of a single file that has both")
    tokenizer_name: str | None = flag(None, "folder of another tokenizer")
    cache_dir: str | None = flag(None, "where files from the hub are kept", infotext=None)


@dataclass(kw_only=True)
class Run(Group):
    """Run"""

    output_dir: Path = flag(Path("out"), "folder for the log, the checkpoints and the result")
    overwrite_output_dir: bool = flag(False, "start over where an earlier run left checkpoints")
    seed: int = flag(0, "everything random follows from it")
    max_train_steps: int | None = flag(None, "optimizer updates; without it, --num_train_epochs counts")
    num_train_epochs: int = flag(100, "passes over the data, if --max_train_steps is not given")
    checkpointing_steps: int = flag(500, "save a state to resume from every so many updates; 0 never")
    checkpoints_total_limit: int | None = flag(None, "keep only the newest so many checkpoints")
    resume_from_checkpoint: str | None = flag(None, "a checkpoint folder, or 'latest'")
    report_to: Literal["none", "tensorboard", "wandb", "all"] = flag(
        "tensorboard", "where curves and pictures go besides log.jsonl; those not installed are left out"
    )
    logging_dir: str = flag("logs", "tensorboard's folder within --output_dir")
    push_to_hub: bool = flag(False, "upload the result when the run is done")
    hub_model_id: str | None = flag(None, "name on the hub; the folder's name by default")
    hub_private_repo: bool = flag(False, "let nobody else see it there")
    hub_token: str | None = flag(None, "token for the hub; the saved one by default")
    local_rank: int = flag(-1, "set by launchers; LOCAL_RANK counts")

    use_ema = cache_latents = False  # where a method has no such flag

    def check(self):
        self.positive("max_train_steps", "num_train_epochs", "checkpoints_total_limit")
        require(self.checkpointing_steps >= 0, "--checkpointing_steps must not be negative")
        require(
            not (self.overwrite_output_dir and self.resume_from_checkpoint),
            "--overwrite_output_dir starts over and --resume_from_checkpoint goes on: give one of them",
        )
        wandb = self.report_to in ("wandb", "all")
        require(
            not (wandb and self.hub_token), "--hub_token would be shown on wandb: log in to the hub instead"
        )


LR_SCHEDULERS = Literal[
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
]


@dataclass(kw_only=True)
class Optimizer(Group):
    """Optimizer"""

    learning_rate: float = flag(1e-5, "peak learning rate")
    use_8bit_adam: bool = flag(False, "keep AdamW's state in 8 bits, by bitsandbytes")
    scale_lr: bool = flag(False, "multiply the learning rate by batch, accumulation and number of devices")
    lr_scheduler: LR_SCHEDULERS = flag("constant", "shape of the learning rate, in updates")
    lr_warmup_steps: int | None = flag(
        None, "updates of linear warm-up; 500 by default, but 'constant' has none"
    )
    lr_num_cycles: int = flag(1, "restarts of cosine_with_restarts")
    lr_power: float = flag(1.0, "exponent of polynomial")
    train_batch_size: int = flag(4, "images in one forward pass on one device")
    gradient_accumulation_steps: int = flag(1, "forward passes in one update")
    adam_beta1: float = flag(0.9, "AdamW's beta1")
    adam_beta2: float = flag(0.999, "AdamW's beta2")
    adam_weight_decay: float = flag(1e-2, "AdamW's weight decay")
    adam_epsilon: float = flag(1e-8, "AdamW's epsilon")
    max_grad_norm: float = flag(1.0, "clip the norm of the gradient to this; 0 does not")
    snr_gamma: float | None = flag(None, "min-SNR weights with this gamma; 5 is usual")
    noise_offset: float = flag(0.0, "add noise of this size that is constant over a picture; 0.1 is usual")
    input_perturbation: float = flag(0.0, "perturb the noise of the input alone; 0.1 is usual")
    prediction_type: Literal["epsilon", "v_prediction"] | None = flag(
        None, "what the network learns to predict; what the model's scheduler says by default"
    )
    rescale_betas_zero_snr: bool = flag(False, "train to pure noise; needs v_prediction")

    def check(self):
        self.positive("learning_rate", "train_batch_size", "gradient_accumulation_steps", "lr_num_cycles")
        self.positive("snr_gamma")
        if self.lr_warmup_steps is None:
            self.lr_warmup_steps = 0 if self.lr_scheduler == "constant" else 500
        elif self.lr_warmup_steps and self.lr_scheduler == "constant":
            print("--lr_scheduler constant has no warm-up: --lr_warmup_steps waits for constant_with_warmup")
        for name in ("lr_warmup_steps", "max_grad_norm", "adam_weight_decay"):
            require(getattr(self, name) >= 0, f"--{name} must not be negative")


KERNELS = Literal["auto", "triton", "torch"]


@dataclass(kw_only=True)
class Precision(Group):
    """Speed and memory"""

    kernels: KERNELS = flag("auto", "who computes attention and norms; auto is triton where it was measured")
    mixed_precision: Literal["no", "fp16", "bf16"] = flag("no", "what frozen networks and autocast run in")
    gradient_checkpointing: bool = flag(False, "recompute activations in the backward pass to save memory")
    allow_tf32: bool = flag(False, "let fp32 matrix products run in TF32")
    enable_xformers_memory_efficient_attention: bool = flag(
        False, "accepted: attention never holds the whole score matrix here, with or without it"
    )
    set_grads_to_none: bool = flag(False, "accepted: gradients are never kept as zeros here")
    dataloader_num_workers: int = flag(0, "processes that prepare pictures; 0 is the main one")

    def check(self):
        require(self.dataloader_num_workers >= 0, "--dataloader_num_workers must not be negative")


@dataclass(kw_only=True)
class Latents(Group):
    """Latents"""

    cache_latents: bool = flag(True, "encode every picture once, where crops are not random")


@dataclass(kw_only=True)
class Data(Group):
    """Data"""

    data: Path = flag(help="folder of pictures", also=("train_data_dir", "instance_data_dir"))
    resolution: int = flag(512, "side of the training pictures, a multiple of 8")
    center_crop: bool = flag(False, "crop to the centred square first")
    skip_bad_images: bool = flag(False, "go on without pictures that cannot be decoded")

    validation_split = 0.0  # where a method has no such flag

    def check(self):
        require(self.resolution > 0 and self.resolution % 8 == 0, "--resolution must be a multiple of 8")


@dataclass(kw_only=True)
class Dataset(Data):
    """Data with columns"""

    data: Path | None = flag(None)
    dataset_name: str | None = flag(None, "a dataset on the hub, or a folder or parquet file, by `datasets`")
    dataset_config_name: str | None = flag(None, "configuration of --dataset_name")
    max_train_samples: int | None = flag(None, "take only so many examples, drawn by --seed")
    validation_split: float = flag(
        0.0,
        "hold out this share of them, or from 1 on so many, and log their loss when pictures would be drawn, "
        "each with one noise and timestep for good",
    )

    def check(self):
        split = self.validation_split
        require(
            0 <= split < 1 or split == int(split) > 0, "--validation_split is a share below 1, or a number"
        )
        require(bool(self.data) != bool(self.dataset_name), "give one of --data and --dataset_name")
        self.positive("max_train_samples")


@dataclass(kw_only=True)
class Captions(Dataset):
    """Captioned data"""

    image_column: str = flag("image", "column of the pictures")
    caption_column: str = flag("text", "column of the captions; of several in a row one is drawn each time")
    random_flip: bool = flag(False, "flip pictures with probability 1/2")
    image_interpolation_mode: Literal["lanczos", "bicubic", "bilinear"] = flag("lanczos", "how to resize")
    caption_dropout: float = flag(0.0, "chance that a caption is left out: guidance needs some")
    bucket: bool = flag(False, "batch pictures by aspect ratio instead of cropping all to a square")

    def check(self):
        self.chances("caption_dropout")


@dataclass(kw_only=True)
class Prior(Group):
    """Prior preservation"""

    with_prior_preservation: bool = flag(False, "train on pictures of the class as well, so that it is kept")
    class_data_dir: Path | None = flag(None, "folder of these; what is missing is drawn by the model itself")
    class_prompt: str | None = flag(None, "what they show")
    num_class_images: int = flag(100, "how many there should be")
    prior_loss_weight: float = flag(1.0, "what they count")
    sample_batch_size: int = flag(4, "how many are drawn at the same time")
    prior_generation_precision: Literal["no", "fp32", "fp16", "bf16"] | None = flag(
        None, "precision that they are drawn in; fp16 on a GPU and fp32 elsewhere by default"
    )

    real_prior = bucket = concepts_list = False  # where a method has no such flag

    def check(self):
        for name in ("class_data_dir", "class_prompt"):
            given = getattr(self, name) is not None or self.concepts_list
            require(not self.with_prior_preservation or given, f"--with_prior_preservation needs --{name}")
        both = self.with_prior_preservation and self.bucket
        require(not both, "--with_prior_preservation and --bucket exclude each other")
        self.positive("num_class_images", "sample_batch_size")


@dataclass(kw_only=True)
class DeepFloyd(Group):
    """Flags of the field's scripts that are for DeepFloyd IF"""

    pre_compute_text_embeddings: bool = flag(
        False, "accepted: a frozen text encoder sees each prompt once, with or without it"
    )
    tokenizer_max_length: int | None = flag(None, "refused: SD v1.x has 77 tokens")
    text_encoder_use_attention_mask: bool = flag(False, "refused: SD v1.x attends to the padding")
    validation_images: list[str] = flag([], "refused: SD v1.x has no upscaler")
    class_labels_conditioning: str | None = flag(None, "refused: SD v1.x has no class labels")

    def check(self):
        for name in ("tokenizer_max_length", "text_encoder_use_attention_mask", "validation_images",
                     "class_labels_conditioning"):  # fmt: skip
            require(not getattr(self, name), f"--{name} is for DeepFloyd IF: it means nothing for SD v1.x")
        both = self.pre_compute_text_embeddings and self.train_text_encoder
        require(not both, "--pre_compute_text_embeddings and --train_text_encoder exclude each other")


@dataclass(kw_only=True)
class Average(Group):
    """Averaged weights"""

    use_ema: bool = flag(False, "keep an average of the weights over the updates, and leave that")
    ema_max_decay: float = flag(0.9999, "how much of the average an update keeps, at most")
    ema_warmup: bool = flag(
        False, "reach it by 1 - (1 + step / inv_gamma)^-power, not (1 + step) / (10 + step)"
    )
    ema_inv_gamma: float = flag(1.0, "inv_gamma of --ema_warmup")
    ema_power: float = flag(0.75, "power of --ema_warmup")
    offload_ema: bool = flag(False, "keep the average in the CPU's memory")
    foreach_ema: bool = flag(False, "accepted: the average is always updated for all tensors at once")

    def check(self):
        self.chances("ema_max_decay")


@dataclass(kw_only=True)
class Validation(Group):
    """Validation"""

    validation_prompt: str | None = flag(None, "draw this while training; {} in it is what is trained")
    validation_guidance_scale: float = flag(7.5, "how far these pictures follow the prompt")
    validation_scheduler: str = flag("ddim", "how their noise is removed, as --scheduler of sample.py")
    num_validation_images: int = flag(4, "pictures each time")
    validation_steps: int | None = flag(
        None, "draw every so many updates; 100, unless --validation_epochs is given"
    )
    validation_epochs: int | None = flag(None, "draw every so many epochs")

    drawn_every = "validation_steps", 100  # if neither is given

    def check(self):
        self.positive("num_validation_images", "validation_steps", "validation_epochs")
        self.validation_scheduler = registry.find("schedulers", self.validation_scheduler)
        given = [f"--{n}" for n in ("validation_steps", "validation_epochs") if getattr(self, n)]
        require(len(given) < 2, f"{' and '.join(given)} exclude each other")
        if not given:
            setattr(self, *self.drawn_every)
