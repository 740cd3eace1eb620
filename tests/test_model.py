"""The model: equal to transformers, blind to padding, and continued by its states."""

from __future__ import annotations

import pytest
import torch
from checkpoints import MAMBA_SSM, TRANSFORMERS, write_mamba_ssm, write_transformers
from tokred_plugins.opset import PLAIN

from tokred_export.checkpoint import build_model, load_checkpoint
from tokred_export.reduction.methods import METHODS, Choice
from tokred_export.reduction.schedule import METHOD_NAMES, solve_schedule
from tokred_export.specs import ReductionSpec


def rel(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def ids(batch, length, vocab=61, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab, (batch, length), dtype=torch.int32, generator=rng)


def full(batch, length):
    return torch.full((batch,), length, dtype=torch.int32)


@pytest.mark.parametrize("config", TRANSFORMERS)
@pytest.mark.parametrize("length", [1, 3, 8, 29])
def test_equals_transformers(tmp_path, config, length):
    """Logits of every token and the states after the last, over the grid of small configs."""
    theirs = write_transformers(tmp_path, **TRANSFORMERS[config]).eval()
    ours = build_model(load_checkpoint(str(tmp_path)), logits="all")
    tokens = ids(2, length)
    with torch.no_grad():
        expected = theirs(tokens.long(), use_cache=True)
        found = ours(tokens, full(2, length))
    assert rel(found.logits, expected.logits) < 1e-4
    for i, (conv, ssm) in enumerate(zip(found.conv_states, found.ssm_states, strict=True)):
        layer = expected.cache_params.layers[i]
        # Their cache is as wide as the convolution, ours keeps what the next step needs.
        assert rel(conv, layer.conv_states[0][:, :, 1:]) < 1e-4
        assert rel(ssm, layer.recurrent_states[0]) < 1e-4


@pytest.mark.parametrize("config", MAMBA_SSM)
def test_states_continue_the_prompt(tmp_path, config):
    """Prefill and then steps give the logits of one long prefill."""
    write_mamba_ssm(tmp_path, **MAMBA_SSM[config])
    checkpoint = load_checkpoint(str(tmp_path))
    whole = build_model(checkpoint, logits="all")
    model = build_model(checkpoint)
    tokens = ids(2, 23, checkpoint.spec.vocab_size)
    with torch.no_grad():
        expected = whole(tokens, full(2, 23)).logits
        out = model(tokens[:, :19], full(2, 19))
        assert rel(out.logits, expected[:, 18]) < 1e-5
        conv, ssm = out.conv_states, out.ssm_states
        for t in range(19, 23):
            logits, conv, ssm = model.step(tokens[:, t], conv, ssm)
            assert rel(logits, expected[:, t]) < 1e-5


@pytest.mark.parametrize("length", [0, 1, 2, 3, 17, 24])
def test_padding_changes_nothing(tmp_path, length):
    """A padded dense prefill equals the bare prompt's, whatever ids stand in the padding."""
    write_mamba_ssm(tmp_path, **MAMBA_SSM["biases"])
    checkpoint = load_checkpoint(str(tmp_path))
    model = build_model(checkpoint)
    tokens = ids(1, 24, checkpoint.spec.vocab_size)
    other = tokens.clone()
    other[:, : 24 - length] = 7
    with torch.no_grad():
        padded, same = (model(x, full(1, length)) for x in (tokens, other))
        for a, b in zip(padded.ssm_states + padded.conv_states,
                        same.ssm_states + same.conv_states, strict=True):
            assert torch.equal(a, b)
        if length == 0:
            assert all(not state.any() for state in padded.ssm_states + padded.conv_states)
            return
        bare = model(tokens[:, 24 - length :], full(1, length))
    assert rel(padded.logits, bare.logits) < 1e-5
    for a, b in zip(padded.ssm_states, bare.ssm_states, strict=True):
        assert rel(a, b) < 1e-5


def schedules(spec, length=48):
    for method in sorted(set(METHOD_NAMES) - {"none"}):
        yield solve_schedule(spec, ReductionSpec(method=method, target=0.2, sites=(0, 1)), length)


def test_short_prompts_are_padded_not_shortened(tmp_path):
    """A prompt that fits behind the last site loses no token and equals the dense model's."""
    write_mamba_ssm(tmp_path)
    checkpoint = load_checkpoint(str(tmp_path))
    dense = build_model(checkpoint)
    tokens = ids(2, 48, checkpoint.spec.vocab_size)
    for schedule in schedules(checkpoint.spec):
        model = build_model(checkpoint, schedule)
        length = schedule.length_out
        with torch.no_grad():
            out = model(tokens, full(2, length))
            bare = dense(tokens[:, 48 - length :], full(2, length))
        assert torch.equal(out.kept_positions[0], torch.arange(length, dtype=torch.int32))
        assert rel(out.logits, bare.logits) < 1e-5


def test_replay_of_own_choices_is_the_same_run(tmp_path):
    """Choices come out in a form that reproduces the run, on plain and custom ops alike."""
    write_mamba_ssm(tmp_path)
    checkpoint = load_checkpoint(str(tmp_path))
    tokens = ids(3, 48, checkpoint.spec.vocab_size)
    lengths = torch.tensor([48, 40, 20], dtype=torch.int32)
    for schedule in schedules(checkpoint.spec):
        model = build_model(checkpoint, schedule)
        with torch.no_grad():
            free = model(tokens, lengths)
            again = model(tokens, lengths, free.choices)
            plain = build_model(checkpoint, schedule, ops=PLAIN)(tokens, lengths)
        assert sum(int((c.src >= 0).sum()) for c in free.choices) > 0
        for other in (again, plain):
            assert torch.equal(free.logits, other.logits)
            assert torch.equal(free.kept_positions, other.kept_positions)


def test_replay_follows_the_given_choice(tmp_path):
    """A choice that eager would not make is obeyed: what it removes is gone."""
    write_mamba_ssm(tmp_path)
    checkpoint = load_checkpoint(str(tmp_path))
    tokens = ids(1, 48, checkpoint.spec.vocab_size)
    schedule = solve_schedule(
        checkpoint.spec, ReductionSpec(method="evit", keep_ratio=0.75, sites=(0,)), 48
    )
    removed = torch.arange(0, 24, 2, dtype=torch.int32)[None]
    choice = Choice(removed, torch.full_like(removed, -1), torch.zeros_like(removed).bool())
    with torch.no_grad():
        out = build_model(checkpoint, schedule)(tokens, full(1, 48), [choice])
    assert set(out.kept_positions[0].tolist()) == set(range(48)) - set(removed[0].tolist())


def test_all_logits_are_those_of_the_kept_tokens(tmp_path):
    """logits="all" ends in the same last token as logits="last"."""
    write_mamba_ssm(tmp_path)
    checkpoint = load_checkpoint(str(tmp_path))
    tokens = ids(2, 48, checkpoint.spec.vocab_size)
    schedule = next(iter(schedules(checkpoint.spec)))
    with torch.no_grad():
        every = build_model(checkpoint, schedule, logits="all")(tokens, full(2, 48)).logits
        last = build_model(checkpoint, schedule)(tokens, full(2, 48)).logits
    assert every.shape[1] == schedule.length_out
    assert rel(last, every[:, -1]) < 1e-5


def test_registry_and_flops_name_the_same_methods():
    """A method cannot be counted but not run, or run but not counted."""
    assert set(METHODS) == set(METHOD_NAMES)
