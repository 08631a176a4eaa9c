"""scheduler_config.json: what diffusers writes by default is accepted, what minisd does not do is refused."""

import ast
import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from minisd import files
from minisd.formats import config_json, diffusers, parts, single_file
from minisd.models import unet2d
from minisd.sampling.pixel_diffusion import scheduler_config

# diffusers' schedulers for models such as SD v1, whose noise schedule is one of betas.
SCHEDULERS = (
    "DDIM DDIMInverse DDIMParallel DDPM DDPMParallel DEISMultistep DPMSolverMultistep DPMSolverSDE "
    "DPMSolverMultistepInverse DPMSolverSinglestep EulerAncestralDiscrete EulerDiscrete HeunDiscrete LCM "
    "KDPM2AncestralDiscrete KDPM2Discrete LMSDiscrete PNDM SASolver TCD UniPCMultistep"
).split()
OTHERS = (
    "CogVideoXDDIM EDMDPMSolverMultistep EDMEuler FlowMatchEulerDiscrete FlowMatchHeunDiscrete UnCLIP".split()
)


def default_config(name: str) -> dict:
    """What diffusers writes for a scheduler of its own, from the signature: some need libraries to import."""
    spec = importlib.util.find_spec("diffusers") or pytest.skip("diffusers is not installed")
    for path in Path(spec.origin).parent.glob("schedulers/scheduling_*.py"):
        source = path.read_text()
        if f"class {name}Scheduler(" in source:
            break
    (node,) = (n for n in ast.parse(source).body if getattr(n, "name", "") == f"{name}Scheduler")
    (init,) = (n for n in node.body if getattr(n, "name", "") == "__init__")
    values = [eval(ast.unparse(default), {"float": float}) for default in init.args.defaults]
    names = [argument.arg for argument in init.args.args[-len(values) :]]
    config = {
        "_class_name": f"{name}Scheduler",
        "_diffusers_version": "9",
        **dict(zip(names, values, strict=True)),
    }
    return json.loads(json.dumps(config))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_what_diffusers_writes_by_default_is_accepted(name):
    config = default_config(name)
    assert config_json.read_scheduler(config, Path("x")) == config


@pytest.mark.parametrize("name", OTHERS)
def test_schedulers_of_other_models_are_refused(name):
    with pytest.raises(ValueError, match=r"^x\.json: "):
        config_json.read_scheduler(default_config(name), Path("x.json"))


@pytest.mark.parametrize("skip_prk_steps", [True, False])
def test_what_is_published_is_accepted(skip_prk_steps):
    config = parts.SD1_SCHEDULER | {
        "skip_prk_steps": skip_prk_steps,
        "tensor_format": "pt",
        "trained_betas": None,
    }
    assert config_json.read_scheduler(config, Path("x")) == config
    assert config_json.read_scheduler(scheduler_config(), Path("x")) == scheduler_config()


@pytest.mark.parametrize(
    "key, values",
    {
        "num_train_timesteps": [0, -1, 10.5, "1000", True],
        "beta_start": [0, -0.1, "0.1", math.nan, math.inf],
        "beta_end": [0, "x", []],
        "beta_schedule": ["sigmoid", "laplace", ["linear"]],
        "trained_betas": [[], [0.1, "x"], 0.1],
        "rescale_betas_zero_snr": ["true", 2],
        "prediction_type": ["flow_prediction", "v"],
        "timestep_spacing": ["even"],
        "steps_offset": [-1, 1.5, "1"],
        "set_alpha_to_one": ["yes"],
        "clip_sample": [2],
        "clip_sample_range": [0, -1],
        "variance_type": ["fixed_small_log", "fixed_large_log", "learned", "learned_range"],
        "final_sigmas_type": ["sigma_max"],
        "original_inference_steps": [0],
        "timestep_scaling": [0],
        "solver_type": ["euler"],
        "algorithm_type": ["dpmsolver", "sde-dpmsolver", "noise_prediction"],
        "solver_order": [1, 3],
        "interpolation_type": ["log_linear"],
        "timestep_type": ["continuous"],
        "lambda_min_clipped": [-5.1],
        "sigma_min": [0.03],
        "sigma_max": [14.6],
        "predict_epsilon": [False],
        "thresholding": [True],
        "predict_x0": [False],
        "disable_corrector": [["x"], 3],
        "use_beta_sigmas": [True],
        "use_lu_lambdas": [True],
        "use_flow_sigmas": [True],
        "use_dynamic_shifting": [True],
        "tresholding": [False],
        "shift": [3.0],
    }.items(),
)  # fmt: skip
def test_what_would_change_the_result_is_refused(key, values):
    for value in values:
        with pytest.raises(ValueError, match=rf"^dir/x\.json: .*{key}.*") as caught:
            config_json.read_scheduler(parts.SD1_SCHEDULER | {key: value}, Path("dir/x.json"))
        assert "\n" not in str(caught.value)
    assert config_json.read_scheduler({key: None}, Path("x")) == {key: None}


def test_every_scheduler_file_is_checked(sd_folder, sd_file, tmp_path, sd_parts):
    bad = sd_parts.scheduler | {"thresholding": True}
    message = "scheduler_config.json: thresholding is True, but minisd needs False"
    diffusers.save(tmp_path / "m", sd_parts)
    files.write_json(tmp_path / "m" / diffusers.SCHEDULER, bad)
    with pytest.raises(ValueError, match=message):
        diffusers.load(tmp_path / "m")
    tensors, metadata = files.read_with_metadata(sd_file)
    entry = json.loads(metadata[single_file.CONFIG]) | {"scheduler": bad}
    files.write(tmp_path / "m.safetensors", tensors, {single_file.CONFIG: json.dumps(entry)})
    with pytest.raises(ValueError, match="m.safetensors: .*thresholding is True"):
        single_file.load(tmp_path / "m.safetensors")
    small = replace(unet2d.DDPM, block_out_channels=(32,), attention=(False,))
    diffusers.save_ddpm(tmp_path / "pixels", unet2d.UNet2D(small), scheduler_config(thresholding=True))
    with pytest.raises(ValueError, match=message):
        diffusers.load_ddpm(tmp_path / "pixels")


@pytest.mark.parametrize("part", config_json.TABLES)
def test_a_number_of_layers_that_takes_minutes_to_build_is_refused(part):
    """Each by each, and the number of levels as well."""
    whole = config_json.to_json(part, config_json.from_json(part, {}, "config.json"))
    layers = {"layers_per_block", "num_hidden_layers"} & whole.keys()
    for key, value in {**dict.fromkeys(layers, 524_288), "block_out_channels": [32] * 5000}.items():
        if key in whole:
            with pytest.raises(ValueError, match=f"config.json: {key} is "):
                config_json.from_json(part, whole | {key: value}, "config.json")
    assert config_json.from_json(part, whole | dict.fromkeys(layers, 3), "config.json")
