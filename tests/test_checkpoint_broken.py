"""Broken checkpoints: each kind of damage, or of another model, gets one clear sentence."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import (
    TRANSFORMERS_BASE,
    edit_config,
    edit_weights,
    refusal,
    write_mamba_ssm,
    write_transformers,
)
from safetensors.torch import load_file, save_file

from tokred_export.checkpoint import load_checkpoint
from tokred_export.errors import EnvironmentUnable, InvalidRequest, TokredError


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """One intact checkpoint per layout; tests work on copies."""
    root = tmp_path_factory.mktemp("originals")
    write_transformers(root / "transformers")
    write_transformers(root / "sharded", max_shard_size="20KB")
    write_mamba_ssm(root / "mamba_ssm")
    return root


@pytest.fixture
def transformers_folder(originals, tmp_path):
    return Path(shutil.copytree(originals / "transformers", tmp_path / "model"))


@pytest.fixture
def sharded_folder(originals, tmp_path):
    return Path(shutil.copytree(originals / "sharded", tmp_path / "model"))


@pytest.fixture
def mamba_ssm_folder(originals, tmp_path):
    return Path(shutil.copytree(originals / "mamba_ssm", tmp_path / "model"))


# ---- broken folders and files


def test_what_is_no_folder_is_refused(tmp_path, transformers_folder):
    """A missing path, a file, and a revision of a folder are requests that mean nothing."""
    assert "there is no folder" in refusal(tmp_path / "nowhere", InvalidRequest)
    assert "there is no folder" in refusal("./nowhere/at/all", InvalidRequest)
    assert "is a file" in refusal(transformers_folder / "config.json", InvalidRequest)
    with pytest.raises(InvalidRequest, match="only hub models have revisions"):
        load_checkpoint(str(transformers_folder), revision="main")


def test_a_missing_demo_model_is_named(tmp_path, monkeypatch):
    """An installation without data says so instead of failing on a path."""
    monkeypatch.setattr("tokred_export.checkpoint.files.DEMO", tmp_path / "demo")
    with pytest.raises(EnvironmentUnable, match="demo model is missing from this installation"):
        load_checkpoint(None)


def test_no_model_means_the_demo_model(transformers_folder, monkeypatch):
    """None loads whatever folder ships as the demo."""
    monkeypatch.setattr("tokred_export.checkpoint.files.DEMO", transformers_folder)
    assert load_checkpoint(None).spec.d_model == TRANSFORMERS_BASE["hidden_size"]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(b'{"model_type": "mam', "is not JSON"), (b"\xff\xfe\x00", "is not JSON"),
     (b"[1, 2]", "holds a JSON list"), (None, "has no config.json")],
)  # fmt: skip
def test_a_broken_config_is_refused(content, complaint, transformers_folder):
    """Missing, cut off, binary, or not an object."""
    config = transformers_folder / "config.json"
    config.unlink() if content is None else config.write_bytes(content)
    assert complaint in refusal(transformers_folder)


def test_no_weights_are_refused_and_what_is_there_is_named(transformers_folder):
    """A consolidated file under another name is shown to the user."""
    weights = transformers_folder / "model.safetensors"
    weights.rename(transformers_folder / "consolidated.safetensors")
    assert "found only consolidated.safetensors" in refusal(transformers_folder)
    (transformers_folder / "consolidated.safetensors").unlink()
    assert "found none" in refusal(transformers_folder)


def test_a_missing_shard_is_named(sharded_folder):
    """The index knows which files there should be."""
    shard = sorted(sharded_folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert f"({shard.name}) are missing" in refusal(sharded_folder)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [("{", "is not JSON"), ("{}", "is not a weight index"),
     ('{"weight_map": {"a": 1}}', "is not a weight index"),
     ('{"weight_map": {}}', "names no shards")],
)  # fmt: skip
def test_a_broken_index_is_refused(content, complaint, sharded_folder):
    """Not JSON, no map, a map to no names, an empty map."""
    (sharded_folder / "model.safetensors.index.json").write_text(content)
    assert complaint in refusal(sharded_folder)


def test_a_tensor_in_two_shards_is_refused(sharded_folder):
    """Which of two would count is not for us to choose."""
    first, second = sorted(sharded_folder.glob("model-*.safetensors"))[:2]
    name, tensor = next(iter(load_file(first).items()))
    save_file({**load_file(second), name: tensor}, second)
    assert f"holds {name} twice" in refusal(sharded_folder)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
@pytest.mark.parametrize(
    ("layout", "file"),
    [("transformers", "model.safetensors"), ("mamba_ssm", "pytorch_model.bin")],
)
def test_truncated_weights_are_refused(layout, file, share, originals, tmp_path):
    """A download that stopped anywhere is called incomplete, with the file and its size."""
    folder = Path(shutil.copytree(originals / layout, tmp_path / "model"))
    whole = (folder / file).read_bytes()
    cut = whole[: int(len(whole) * share)]
    (folder / file).write_bytes(cut)
    assert f"{file} ({len(cut)} bytes) is damaged or incomplete" in refusal(folder)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_garbage_and_lfs_pointers_are_refused(file, originals, tmp_path):
    """Random bytes are damage; a Git LFS pointer has its own remedy."""
    shutil.copy(originals / "transformers" / "config.json", tmp_path)
    (tmp_path / file).write_bytes(random.Random(0).randbytes(4096))
    assert "is damaged or incomplete" in refusal(tmp_path)
    (tmp_path / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "git lfs pull" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("layout", "file"),
    [("transformers", "model.safetensors"), ("mamba_ssm", "pytorch_model.bin"),
     ("mamba_ssm", "config.json"), ("sharded", "model.safetensors.index.json")],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")  # torch warns of odd pickles
def test_flipped_bytes_never_end_in_a_traceback(layout, file, originals, tmp_path):
    """Whatever a damaged byte does, the result is a checkpoint or one of our own errors."""
    folder = Path(shutil.copytree(originals / layout, tmp_path / "model"))
    whole, rng, refused = (folder / file).read_bytes(), random.Random(7), 0
    for _ in range(150):
        damaged = bytearray(whole)
        # The structure sits in the first bytes; the rest is numbers.
        damaged[rng.randrange(min(len(whole), 1500))] = rng.randrange(256)
        (folder / file).unlink()  # never rewrite a file in place that is still mapped
        (folder / file).write_bytes(damaged)
        try:
            load_checkpoint(str(folder))
        except TokredError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 20


class Payload:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_in_a_pickle_is_not_run(mamba_ssm_folder, tmp_path):
    """The function is named, and nothing happened."""
    file = mamba_ssm_folder / "pytorch_model.bin"
    state = torch.load(file)
    file.unlink()
    torch.save({**state, "extra": Payload(tmp_path / "ran")}, file)
    assert "would run Python code when loaded (posix.mkdir)" in refusal(mamba_ssm_folder)
    assert not (tmp_path / "ran").exists()


def test_a_pickle_of_something_else_is_refused(mamba_ssm_folder):
    """A training checkpoint around the state dict, or no dict at all."""
    file = mamba_ssm_folder / "pytorch_model.bin"
    state = torch.load(file)
    file.unlink()
    torch.save({"model": state, "step": 7}, file)
    assert "holds a dict under model, expected only tensors" in refusal(mamba_ssm_folder)
    torch.save([torch.ones(3)], file)
    assert "holds a list, expected a dict" in refusal(mamba_ssm_folder)


# ---- broken tensors


def test_missing_tensors_are_named(transformers_folder):
    """One by its name, many by the first three and a count."""
    edit_weights(transformers_folder, lambda s: s.pop("backbone.layers.1.mixer.A_log"))
    assert "lacks 1 of 30 tensors (backbone.layers.1.mixer.A_log)" in refusal(transformers_folder)
    edit_config(transformers_folder, num_hidden_layers=4)
    message = refusal(transformers_folder)
    assert "lacks 10 of 39 tensors" in message
    assert "and 7 more" in message


def test_unexpected_tensors_are_named(transformers_folder):
    """More layers than the config says, and biases it does not have."""
    edit_config(transformers_folder, num_hidden_layers=2, use_conv_bias=False)
    message = refusal(transformers_folder)
    assert "holds 11 tensors that config.json does not describe" in message
    assert message.count("backbone.layers.") == 3
    assert "and 8 more" in message


def test_renamed_tensors_are_shown_beside_the_missing_ones(transformers_folder):
    """A prefix from some wrapper makes every name both missing and unknown."""

    def prefix(state: dict[str, torch.Tensor]) -> None:
        for name in list(state):
            state[f"module.{name}"] = state.pop(name)

    edit_weights(transformers_folder, prefix)
    message = refusal(transformers_folder)
    assert "lacks 30 of 30 tensors" in message
    assert "30 have unknown names (module.backbone." in message


@pytest.mark.parametrize(
    ("name", "shape"),
    [("backbone.layers.0.mixer.D", (64,)), ("backbone.layers.2.mixer.conv1d.weight", (88, 4)),
     ("backbone.norm_f.weight", (32, 1)), ("backbone.layers.0.mixer.dt_bias", ())],
)  # fmt: skip
def test_a_wrong_shape_is_refused(name, shape, transformers_folder):
    """Name, found and expected shape; equal element counts do not excuse it."""
    expected = list(load_file(transformers_folder / "model.safetensors")[name].shape)
    edit_weights(transformers_folder, lambda state: state.update({name: torch.ones(shape)}))
    message = refusal(transformers_folder)
    assert f"{name} has shape {list(shape)}, expected {expected}" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_that_are_not_finite_are_counted(value, dtype, transformers_folder):
    """The tensor's name and how many of its values are not numbers."""
    name = "backbone.layers.1.mixer.out_proj.weight"

    def spoil(state: dict[str, torch.Tensor]) -> None:
        state[name] = state[name].to(dtype)
        state[name][1, 2:5] = value

    edit_weights(transformers_folder, spoil)
    assert f"{name} holds 3 values that are NaN or infinite" in refusal(transformers_folder)


def test_not_finite_values_are_counted_across_pieces(transformers_folder, monkeypatch):
    """Large tensors are looked at in pieces; the count is of all of them."""
    monkeypatch.setattr("tokred_export.checkpoint.load.PIECE", 7)
    before = load_checkpoint(str(transformers_folder)).weights_sha256
    monkeypatch.undo()
    assert load_checkpoint(str(transformers_folder)).weights_sha256 == before
    monkeypatch.setattr("tokred_export.checkpoint.load.PIECE", 7)
    edit_weights(transformers_folder, lambda s: s["lm_head.weight"][::2].fill_(float("nan")))
    assert f"holds {31 * 32} values that are NaN" in refusal(transformers_folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float8_e4m3fn, torch.float64])
def test_other_dtypes_are_refused(dtype, transformers_folder):
    """Quantised weights are not silently cast."""
    name = "backbone.layers.0.mixer.in_proj.weight"
    edit_weights(transformers_folder, lambda state: state.update({name: state[name].to(dtype)}))
    message = refusal(transformers_folder)
    assert f"{name} is {str(dtype).removeprefix('torch.')}, expected float32" in message


# ---- configs that mean another model


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
         "architecture llama ['LlamaForCausalLM'], expected a Mamba-2 language model; known are"),
        ({"model_type": None, "architectures": None}, "no known architecture"),
        ({"architectures": ["Mamba2Model"]}, "architectures is Mamba2Model"),
        ({"hidden_act": "gelu"}, "hidden_act is gelu, only silu"),
        ({"num_heads": 5}, "n_heads 5 x head_dim 16 is not d_inner 64"),
        ({"n_groups": 3}, "n_groups 3 does not divide n_heads 4"),
        ({"n_groups": 0}, "$.n_groups"),
        ({"hidden_size": "32"}, "Expected `int`, got `str` - at `$.hidden_size`"),
        ({"time_step_limit": [0.5, 0.1]}, "expected 0 <= low <= high"),
        ({"time_step_limit": [float("nan"), 0.1]}, "expected 0 <= low <= high"),
        ({"time_step_limit": [float("inf"), float("inf")]}, "expected 0 <= low <= high"),
        ({"time_step_limit": [0.0, "much"]}, "expected two numbers"),
        ({"time_step_limit": [0.0]}, "time_step_limit"),
    ],
)  # fmt: skip
def test_transformers_configs_of_other_models_are_refused(changes, complaint, transformers_folder):
    """Each reason has its own sentence, with the config's path in front."""
    edit_config(transformers_folder, **changes)
    message = refusal(transformers_folder)
    assert complaint in message
    assert message.startswith(str(transformers_folder / "config.json"))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"ssm_cfg": {}}, "ssm_cfg.layer is Mamba1 (mamba_ssm takes Mamba1 where"),
        ({"ssm_cfg": None}, "ssm_cfg.layer is Mamba1"),
        ({"ssm_cfg": {"layer": "Mamba3"}}, "ssm_cfg.layer is Mamba3"),
        ({"ssm_cfg": {"layer": "Mamba2", "surprise": 1}}, "unknown field `surprise`"),
        ({"ssm_cfg": {"layer": "Mamba2", "rmsnorm": False}}, "ssm_cfg.rmsnorm is false"),
        ({"ssm_cfg": {"layer": "Mamba2", "D_has_hdim": True}}, "ssm_cfg.D_has_hdim is true"),
        ({"ssm_cfg": {"layer": "Mamba2", "d_ssm": 32}}, "d_ssm is 32 of d_inner 64"),
        ({"ssm_cfg": {"layer": "Mamba2", "process_group": 1}}, "process_group is set"),
        ({"ssm_cfg": {"layer": "Mamba2", "headdim": 48}}, "n_heads 1 x head_dim 48"),
        ({"ssm_cfg": {"layer": "Mamba2", "dt_limit": [1, 0]}}, "ssm_cfg.dt_limit is [1.0, 0.0]"),
        ({"rms_norm": False}, "rms_norm is false"),
        ({"d_intermediate": 128}, "d_intermediate is 128"),
        ({"attn_layer_idx": [1, 2]}, "layers [1, 2] are attention"),
        ({"d_model": 0}, "$.d_model"),
        ({"model_type": "mamba"}, "architecture mamba, expected a Mamba-2 language model"),
    ],
)
def test_mamba_ssm_configs_of_other_models_are_refused(changes, complaint, mamba_ssm_folder):
    """Each feature of mamba_ssm that is not Mamba-2 as we build it has its own sentence."""
    edit_config(mamba_ssm_folder, **changes)
    message = refusal(mamba_ssm_folder)
    assert complaint in message
    assert message.startswith(str(mamba_ssm_folder / "config.json"))


def test_settings_of_training_and_kernels_are_accepted(mamba_ssm_folder):
    """Arguments of mamba_ssm's mixer that do not change a trained model are no obstacle."""
    before = load_checkpoint(str(mamba_ssm_folder)).spec
    config = json.loads((mamba_ssm_folder / "config.json").read_text())
    more = {"A_init_range": [1, 16], "dt_max": 0.1, "use_mem_eff_path": False, "d_ssm": 64}
    edit_config(mamba_ssm_folder, ssm_cfg={**config["ssm_cfg"], **more}, d_intermediate=[0, 0, 0])
    assert load_checkpoint(str(mamba_ssm_folder)).spec == before
