"""Checkpoints: both layouts come back tensor for tensor, and models hold what they held."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from checkpoints import (
    MAMBA_SSM,
    TRANSFORMERS,
    edit_config,
    edit_weights,
    refusal,
    write_mamba_ssm,
    write_transformers,
)
from safetensors.torch import load_file

from tokred_export.checkpoint import build_model, load_checkpoint
from tokred_export.checkpoint.layouts import model_spec
from tokred_export.errors import CheckpointError

GROUPS_WARNING = "ignore:n_groups is:UserWarning"


def our_name(theirs: str) -> str:
    """The mapping once more, as a chain of replacements instead of a table."""
    for old, new in (
        ("backbone.embeddings", "embedding"), ("backbone.embedding", "embedding"),
        ("backbone.", ""), ("mixer.norm.weight", "gate_norm_weight"), ("mixer.", ""),
        ("norm.weight", "norm_weight"), ("norm_f.weight", "norm_f_weight"),
        ("conv1d.", "conv_"), (".A_log", ".a_log"), (".D", ".d"),
    ):  # fmt: skip
        theirs = theirs.replace(old, new)
    return theirs


def assert_same_tensors(found: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    expected = {
        our_name(name): t.squeeze(1) if "conv1d.weight" in name else t
        for name, t in theirs.items()
    }
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


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
def mamba_ssm_folder(originals, tmp_path):
    return Path(shutil.copytree(originals / "mamba_ssm", tmp_path / "model"))


# ---- intact checkpoints


@pytest.mark.filterwarnings(GROUPS_WARNING)
@pytest.mark.parametrize("variant", TRANSFORMERS)
def test_transformers_checkpoints_come_back(variant, tmp_path):
    """Every tensor of transformers' own model comes back, and the spec says what its config did."""
    model = write_transformers(tmp_path, **TRANSFORMERS[variant])
    found = load_checkpoint(str(tmp_path))
    assert_same_tensors(found.tensors, dict(model.named_parameters()))
    config, mixer, spec = model.config, model.backbone.layers[0].mixer, found.spec
    assert spec.layout == "transformers"
    assert spec.in_proj_dim == mixer.in_proj.out_features
    assert spec.conv_dim == mixer.conv1d.in_channels
    assert spec.norm_group_size == mixer.norm.group_size
    assert spec.norm_before_gate is False
    assert spec.residual_in_fp32 == config.residual_in_fp32
    assert spec.tie_embeddings == config.tie_word_embeddings
    limits = (spec.dt_min, float("inf") if spec.dt_max is None else spec.dt_max)
    assert limits == tuple(config.time_step_limit)


@pytest.mark.parametrize("weights", ["bin", "safetensors"])
@pytest.mark.parametrize("variant", MAMBA_SSM)
def test_mamba_ssm_checkpoints_come_back(variant, weights, tmp_path):
    """Every tensor comes back, less a tied head; groups are normalised each by itself."""
    state = write_mamba_ssm(tmp_path, weights=weights, **MAMBA_SSM[variant])
    spec = load_checkpoint(str(tmp_path)).spec
    if spec.tie_embeddings:
        del state["lm_head.weight"]
    assert_same_tensors(load_checkpoint(str(tmp_path)).tensors, state)
    assert spec.norm_group_size == spec.d_inner // spec.n_groups
    assert spec.norm_before_gate == ("norm-before-gate" in variant)
    assert (spec.dt_min, spec.dt_max) == ((0.01, 0.2) if variant == "dt-limits" else (0.0, None))


def test_the_vocabulary_is_padded_as_mamba_ssm_does(tmp_path):
    """61 words in multiples of 16 are 64 rows; a multiple that divides adds none."""
    write_mamba_ssm(tmp_path / "a", pad_vocab_size_multiple=16)
    write_mamba_ssm(tmp_path / "b", vocab_size=48, pad_vocab_size_multiple=16)
    assert load_checkpoint(str(tmp_path / "a")).spec.vocab_size == 64
    assert load_checkpoint(str(tmp_path / "b")).spec.vocab_size == 48


def test_published_configs_are_read():
    """state-spaces/mamba2-2.7b and Codestral, with the keys their hub pages show."""
    mamba2 = {
        "d_model": 2560, "d_intermediate": 0, "n_layer": 64, "vocab_size": 50277,
        "ssm_cfg": {"layer": "Mamba2"}, "attn_layer_idx": [], "attn_cfg": {}, "rms_norm": True,
        "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 16,
        "tie_embeddings": True,
    }  # fmt: skip
    spec = model_spec(mamba2, Path("config.json"))
    assert (spec.vocab_size, spec.d_inner, spec.n_heads, spec.d_state) == (50288, 5120, 80, 128)
    assert (spec.in_proj_dim, spec.conv_dim, spec.dt_max) == (10576, 5376, None)
    codestral = {
        "architectures": ["Mamba2ForCausalLM"], "model_type": "mamba2", "chunk_size": 256,
        "conv_kernel": 4, "expand": 2, "head_dim": 64, "hidden_act": "silu", "hidden_size": 4096,
        "intermediate_size": 8192, "layer_norm_epsilon": 1e-05, "n_groups": 8,
        "norm_before_gate": True, "num_heads": 128, "num_hidden_layers": 64,
        "residual_in_fp32": True, "rms_norm": True, "state_size": 128,
        "tie_word_embeddings": False, "time_step_limit": [0.0, float("inf")],
        "use_bias": False, "use_conv_bias": True, "vocab_size": 32768,
    }  # fmt: skip
    with pytest.warns(UserWarning, match="n_groups is 8"):
        spec = model_spec(codestral, Path("config.json"))
    assert (spec.norm_group_size, spec.conv_dim, spec.in_proj_dim) == (1024, 10240, 18560)
    assert not spec.tie_embeddings
    assert not spec.norm_before_gate, "transformers does not read that key"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_weights_keep_their_dtype(dtype, tmp_path):
    """Nothing is converted on loading, in either layout."""
    model = write_transformers(tmp_path / "a", dtype=dtype)
    state = write_mamba_ssm(tmp_path / "b", dtype=dtype, tie_embeddings=False)
    assert_same_tensors(
        load_checkpoint(str(tmp_path / "a")).tensors, dict(model.named_parameters())
    )
    assert_same_tensors(load_checkpoint(str(tmp_path / "b")).tensors, state)


def test_one_content_has_one_hash_in_any_files(originals, tmp_path):
    """Shards, single files, pickles and the other layout's names hash alike."""
    single = load_checkpoint(str(originals / "transformers"))
    sharded = load_checkpoint(str(originals / "sharded"))
    assert len(list((originals / "sharded").glob("*.safetensors"))) > 2
    assert list(single.tensors) == list(sharded.tensors)
    shutil.copy(originals / "transformers" / "config.json", tmp_path)
    state = load_file(originals / "transformers" / "model.safetensors")
    torch.save(state, tmp_path / "pytorch_model.bin")
    pickled = load_checkpoint(str(tmp_path))
    write_mamba_ssm(tmp_path / "mamba", vocab_size=61, pad_vocab_size_multiple=1)
    renamed = {n.replace("embeddings", "embedding"): t for n, t in state.items()}
    torch.save(renamed, tmp_path / "mamba" / "pytorch_model.bin")
    edit_config(tmp_path / "mamba", tie_embeddings=False)
    other_layout = load_checkpoint(str(tmp_path / "mamba"))
    hashes = {c.weights_sha256 for c in (single, sharded, pickled, other_layout)}
    assert len(hashes) == 1
    assert re.fullmatch("[0-9a-f]{64}", hashes.pop())


def test_other_content_has_another_hash(transformers_folder):
    """One changed bit changes the hash, and so does another dtype of the same values."""

    def flip(state: dict[str, torch.Tensor]) -> None:
        state["backbone.norm_f.weight"][3] += 2**-20

    def to_bfloat16(state: dict[str, torch.Tensor]) -> None:
        state.update({name: tensor.bfloat16() for name, tensor in state.items()})

    def to_float32(state: dict[str, torch.Tensor]) -> None:
        state.update({name: tensor.float() for name, tensor in state.items()})

    hashes = [load_checkpoint(str(transformers_folder)).weights_sha256]
    for change in (flip, to_bfloat16, to_float32):  # the last two hold the same values
        edit_weights(transformers_folder, change)
        hashes.append(load_checkpoint(str(transformers_folder)).weights_sha256)
    assert len(set(hashes)) == 4


def test_sharded_pickles_are_read(transformers_folder):
    """pytorch_model.bin.index.json and its shards work as the safetensors ones do."""
    before = load_checkpoint(str(transformers_folder))
    state = load_file(transformers_folder / "model.safetensors")
    weight_map = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(state)}
    for shard in set(weight_map.values()):
        part = {name: t for name, t in state.items() if weight_map[name] == shard}
        torch.save(part, transformers_folder / shard)
    index = transformers_folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (transformers_folder / "model.safetensors").unlink()
    assert load_checkpoint(str(transformers_folder)).weights_sha256 == before.weights_sha256


def test_provenance_and_companion_files(transformers_folder):
    """The source is the folder; config and tokenizer files are listed, weights are not."""
    (transformers_folder / "tokenizer.json").write_text("{}")
    (transformers_folder / "notes.txt").write_text("not to be copied")
    found = load_checkpoint(str(transformers_folder))
    assert (found.source, found.revision) == (str(transformers_folder.resolve()), None)
    assert set(found.files) == {"config.json", "generation_config.json", "tokenizer.json"}
    assert all(Path(path).name == name for name, path in found.files.items())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    ("layout", "file"),
    [("transformers", "model.safetensors"), ("mamba_ssm", "pytorch_model.bin")],
)
def test_weights_are_mapped_not_read(layout, file, originals):
    """Tensors are backed by the file, so that a large checkpoint is not held in memory."""
    found = load_checkpoint(str(originals / layout))
    mapped = [
        range(*(int(end, 16) for end in line.split()[0].split("-")))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(originals / layout / file))
    ]
    for name, tensor in found.tensors.items():
        assert any(tensor.data_ptr() in addresses for addresses in mapped), name


def test_the_old_spelling_of_the_embedding_is_read(transformers_folder):
    """transformers' load hook takes mamba_ssm's backbone.embedding, and so do we."""
    before = load_checkpoint(str(transformers_folder)).weights_sha256
    edit_weights(
        transformers_folder,
        lambda s: s.update({"backbone.embedding.weight": s.pop("backbone.embeddings.weight")}),
    )
    assert load_checkpoint(str(transformers_folder)).weights_sha256 == before


@pytest.mark.parametrize(
    ("written", "dt_max"),
    [
        ([0.0, {"__float__": "Infinity"}], None),
        ([0.0, float("inf")], None),
        (["0.0", "inf"], None),
        ([0, "Infinity"], None),
        ([0.0, 0.5], 0.5),
        ([-1.0, 0.5], 0.5),
    ],
)
def test_every_spelling_of_a_dt_limit(written, dt_max, transformers_folder):
    """Infinity as an object, a float or a string is no clamp; a negative lower limit is none."""
    edit_config(transformers_folder, time_step_limit=written)
    spec = load_checkpoint(str(transformers_folder)).spec
    assert (spec.dt_min, spec.dt_max) == (0.0, dt_max)


def test_groups_in_the_transformers_layout_warn(tmp_path):
    """Releases of transformers disagree there; a single group, or mamba_ssm, is silent."""
    write_transformers(tmp_path / "groups", n_groups=2)
    with pytest.warns(UserWarning, match=r"n_groups is 2.*transformers#35943") as caught:
        load_checkpoint(str(tmp_path / "groups"))
    assert caught[0].filename == __file__
    write_transformers(tmp_path / "one")
    write_mamba_ssm(tmp_path / "ssm", ssm_cfg={"ngroups": 2})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_checkpoint(str(tmp_path / "one"))
        load_checkpoint(str(tmp_path / "ssm"))


# ---- tied heads


def test_an_equal_head_of_a_tied_model_is_dropped(tmp_path):
    """Both libraries have written tied heads out; equal ones are no second tensor."""
    write_mamba_ssm(tmp_path)
    assert "lm_head.weight" in torch.load(tmp_path / "pytorch_model.bin")
    assert "lm_head.weight" not in load_checkpoint(str(tmp_path)).tensors


def test_a_different_head_of_a_tied_model_is_refused(transformers_folder):
    """Dropping it would silently change the model."""
    edit_config(transformers_folder, tie_word_embeddings=True)
    assert "lm_head.weight differs from the embedding" in refusal(transformers_folder)


def test_an_untied_model_without_a_head_is_refused(transformers_folder):
    """The embedding is not put in its place."""
    edit_weights(transformers_folder, lambda state: state.pop("lm_head.weight"))
    assert "lacks 1 of" in (message := refusal(transformers_folder))
    assert "(lm_head.weight)" in message


# ---- the model


@pytest.mark.filterwarnings(GROUPS_WARNING)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("variant", ["plain", "tied", "groups", "biases", "no-conv-bias"])
def test_a_model_holds_the_checkpoints_weights(variant, dtype, tmp_path):
    """Converted once; what makes the decay stays float32, or goes along to float64."""
    write_transformers(tmp_path, dtype=torch.bfloat16, **TRANSFORMERS[variant])
    checkpoint = load_checkpoint(str(tmp_path))
    model = build_model(checkpoint, dtype=dtype)
    assert not model.training
    parameters = dict(model.named_parameters())
    assert parameters.keys() == checkpoint.tensors.keys()
    for name, parameter in parameters.items():
        decay = name.rpartition(".")[2] in ("dt_bias", "a_log", "d")
        wanted = torch.float32 if decay and dtype != "float64" else getattr(torch, dtype)
        assert parameter.dtype == wanted, name
        assert not parameter.requires_grad
        assert torch.equal(parameter, checkpoint.tensors[name].to(wanted))
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))


def test_a_model_of_the_same_dtype_shares_the_mapped_memory(originals):
    """No second copy of a large checkpoint."""
    checkpoint = load_checkpoint(str(originals / "transformers"))
    for name, parameter in build_model(checkpoint).named_parameters():
        assert parameter.data_ptr() == checkpoint.tensors[name].data_ptr(), name


def test_weights_beyond_float16_are_refused(tmp_path):
    """bfloat16 reaches further: the cast would make infinities."""
    write_transformers(tmp_path, dtype=torch.bfloat16)
    edit_weights(tmp_path, lambda s: s["backbone.layers.2.mixer.in_proj.weight"][0, :2].fill_(1e5))
    checkpoint = load_checkpoint(str(tmp_path))
    build_model(checkpoint, dtype="bfloat16")
    with pytest.raises(CheckpointError, match=r"layers\.2\.in_proj\.weight holds 2 values beyond"):
        build_model(checkpoint, dtype="float16")
