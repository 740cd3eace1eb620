"""Where an engine leaves eager, found in records of engines broken at known places."""

import numpy as np
import pytest
from tiny_engines import (
    comparison,
    damaged,
    eager_engine,
    ort_engine,
    prompts,
    schedule_of,
    stored_case,
    tiny_model,
)
from tokred_plugins.opset import PLAIN

from tokred_export.verify.bisect import JUMP, first_divergence
from tokred_export.verify.judge import FLOAT32
from tokred_export.verify.parity import measure_case


@pytest.fixture(scope="module")
def model():
    """Eager, the baseline."""
    return tiny_model()


def diverges(model, run, lengths=(37, 33)):
    """The first divergence of an engine."""
    case = measure_case(model, run, "prefill-37", *prompts(lengths), "random")
    return first_divergence(case, model.schedule, FLOAT32)


def by_hand(*changed, **fields):
    """The first divergence of a stored case."""
    return first_divergence(stored_case(*changed, **fields), schedule_of(), FLOAT32)


def test_a_right_engine_does_not_diverge(model):
    """ONNX Runtime's rounding is no divergence."""
    assert diverges(model, ort_engine()) is None


@pytest.mark.parametrize(
    ("weight", "tensor", "site"),
    [
        ("layers.0.norm_weight", "present.conv_state.0", None),
        ("layers.0.conv_weight", "present.ssm_state.0", None),
        ("layers.1.norm_weight", "present.conv_state.1", 0),
        ("layers.1.a_log", "present.ssm_state.1", 0),
        ("layers.1.gate_norm_weight", "present.conv_state.2", 1),
        ("layers.2.dt_bias", "present.ssm_state.2", 1),
        ("norm_f_weight", "logits", None),
    ],
)
def test_a_wrong_weight_is_found_in_its_layer(model, weight, tensor, site):
    """The first tensor behind the weight, in the order of the computation, is named."""

    def change(array):
        array *= 1.05

    found = diverges(model, ort_engine(weight, change))
    assert (found.tensor, found.site) == (tensor, site)
    assert found.layer == (None if tensor == "logits" else int(tensor[-1]))
    assert found.site_layer == (None if site is None else model.schedule.sites[site].layer)
    assert found.rel_l2 > JUMP * found.noise_rel_l2
    assert found.reason.startswith(tensor)


def test_a_wrong_merge_is_found_behind_its_site(model):
    """An engine that merges wrongly at both sites leaves eager right behind the first."""

    def token_reduce(hidden, residual, keep, src, dst, merge):
        return PLAIN.token_reduce(hidden, residual, keep, src, dst, ~merge)

    found = diverges(model, eager_engine(model, token_reduce=token_reduce))
    assert (found.layer, found.site, found.site_layer) == (1, 0, 0)
    assert "site 0 lies right before this layer" in found.reason


def test_a_wrong_choice_is_found_at_its_site(model):
    """A choice that no rounding explains is a divergence though the replay agrees."""

    def token_match(hidden, lower, upper):
        similarity, target = PLAIN.token_match(hidden, lower, upper)
        return (similarity, target) if lower.shape[1] == 18 else (similarity, target.flip(1))

    found = diverges(model, eager_engine(model, token_match=token_match))
    assert (found.tensor, found.site, found.layer) == ("choice.src.1", 1, 1)
    assert "no rounding explains" in found.reason


def test_the_earlier_of_choice_and_tensor(model):
    """What comes first in the computation is named: here a choice, there a state before it."""

    def token_match(hidden, lower, upper):
        similarity, target = PLAIN.token_match(hidden, lower, upper)
        return similarity, target.flip(1)

    run = eager_engine(model, token_match=token_match)
    late = damaged(run, present__conv_state__1=lambda found: 2 * found["present.conv_state.1"])
    assert diverges(model, late).tensor == "choice.src.0"
    early = damaged(run, present__ssm_state__0=lambda found: 2 * found["present.ssm_state.0"])
    assert diverges(model, early).tensor == "present.ssm_state.0"


def test_nan_is_a_divergence(model):
    """NaN is named as such, in the layer that it first appears in."""
    run = damaged(ort_engine(), present__ssm_state__1=lambda f: f["present.ssm_state.1"] * np.nan)
    found = diverges(model, run)
    assert found.tensor == "present.ssm_state.1" and "NaN" in found.reason


def test_an_unusable_output_is_named(model):
    """A missing output comes before all comparisons."""
    found = diverges(model, damaged(ort_engine(), present__conv_state__2=None))
    assert (found.tensor, found.layer, found.rel_l2) == ("present.conv_state.2", 2, None)
    found = diverges(model, damaged(ort_engine(), choice__dst__1=None))
    assert (found.tensor, found.site, found.layer) == ("choice.dst.1", 1, 1)


def test_where_an_error_enters_below_its_tolerance():
    """What ends above tolerance is followed back to where it left the noise floor."""
    late = comparison("logits", 2e-4, 1e-7)
    entered = comparison("present.ssm_state.1", 1e-5, 1e-7)
    found = by_hand(late, entered)
    assert found.tensor == "present.ssm_state.1"
    assert "within its tolerance, but more than 30 x its noise floor" in found.reason
    assert by_hand(late).tensor == "logits"
    assert by_hand(entered) is None  # for nothing is wrong in the end
    noisy = comparison("present.ssm_state.1", 1e-5, 1e-6)
    assert by_hand(late, noisy).tensor == "logits"


def test_layers_are_in_numeric_order():
    """Layer 2 comes before layer 10."""
    wrong = [comparison(f"present.conv_state.{i}", 1.0) for i in (10, 2)]
    assert by_hand(*wrong, layers=11).layer == 2


def test_sites_are_those_of_the_schedule(model):
    """A dense model has no site to suspect."""
    dense = tiny_model(schedule=schedule_of("none", ()))

    def ssd_scan(*arguments):
        y, state = PLAIN.ssd_scan(*arguments)
        return y + 0.01, state

    found = diverges(dense, eager_engine(dense, ssd_scan=ssd_scan))
    assert (found.tensor, found.site) == ("present.conv_state.1", None)
