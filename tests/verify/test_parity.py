"""Parity of right engines and of engines damaged on purpose, measured and judged."""

import dataclasses
import math

import msgspec
import numpy as np
import pytest
import torch
from tiny_engines import (
    LENGTH,
    SITES,
    SPEC,
    damaged,
    eager_engine,
    ort_engine,
    prompts,
    record_of,
    schedule_of,
    tiny_model,
)
from tokred_plugins.opset import CUSTOM, PLAIN

from tokred_export.errors import InvalidRequest
from tokred_export.specs import Site
from tokred_export.verify import parity
from tokred_export.verify.judge import FLOAT32, SIXTEEN_BIT, judge_parity
from tokred_export.verify.margins import EXPLAINED, unexplained
from tokred_export.verify.parity import _schedule_of, measure_case, noise_of
from tokred_export.verify.records import ParityRecord
from tokred_export.verify.replay import in_dtype, replay

BATCHES = {"full": [37, 37, 37], "mixed": [37, 33, 5], "short": [0, 1, 26]}


@pytest.fixture(scope="module")
def model():
    """Eager, the baseline."""
    return tiny_model()


@pytest.fixture(scope="module")
def onnx_run():
    """ONNX Runtime on the exported model."""
    return ort_engine()


def measure(model, run, lengths=(37, 33, 5), **options):
    """One case; random prompts of these lengths."""
    return measure_case(model, run, "prefill-37", *prompts(lengths), "random", **options)


def reasons(case, tolerance=FLOAT32):
    """Why a case fails, one string; empty for a pass."""
    return "\n".join(judge_parity(record_of(case), tolerance).reasons)


# --- engines that are right ----------------------------------------------------------------------


@pytest.mark.parametrize("batch", BATCHES)
def test_onnx_runtime_passes(model, onnx_run, batch):
    """The exported graph agrees on all tensors and, here without a near tie, on all choices."""
    lengths = BATCHES[batch]
    case = measure(model, onnx_run, lengths)
    assert reasons(case) == ""
    names = [comparison.name for comparison in case.tensors]
    states = [f"present.{kind}_state.{i}" for i in range(3) for kind in ("conv", "ssm")]
    assert names == ["logits", "kept_positions", *states]
    assert (case.kept_exact, case.kept_jaccard, case.prompt_lengths) == (True, 1, tuple(lengths))
    assert case.logits.top1_agreement == 1 and case.logits.kl < 1e-9
    for agreement, site in zip(case.sites, SITES, strict=True):
        assert (agreement.same_source, agreement.same_target, agreement.same_merge) == (1, 1, 1)
        assert (agreement.layer, agreement.tokens_in) == (site.layer, site.tokens_in)
        # Padding goes first: a row loses as many prompt tokens as padding does not cover.
        left = [site.removed - min(max(site.tokens_in - n, 0), site.removed) for n in lengths]
        assert (agreement.removed, agreement.real_removed) == (site.removed, sum(left))


def test_numbers_are_those_of_numpy(model, onnx_run):
    """Error and noise floor, taken again by hand from a free eager run in float32 and float64."""
    ids, lengths = prompts([37])
    found = onnx_run({"input_ids": ids, "prompt_len": lengths})
    case = measure_case(model, onnx_run, "prefill-37", ids, lengths, "full")
    tensors = torch.from_numpy(ids), torch.from_numpy(lengths)
    with torch.no_grad():
        base, exact = model(*tensors), in_dtype(model, torch.float64)(*tensors)
    for i in range(SPEC.n_layer):
        (comparison,) = (t for t in case.tensors if t.name == f"present.ssm_state.{i}")
        a, b = base.ssm_states[i].double().numpy(), exact.ssm_states[i].numpy()
        error = np.abs(found[comparison.name].astype(np.float64) - a)
        size = math.sqrt((a**2).sum())
        assert comparison.max_abs == error.max()
        assert comparison.mean_abs == pytest.approx(error.mean(), rel=1e-12)
        assert comparison.rel_l2 == pytest.approx(math.sqrt((error**2).sum()) / size, rel=1e-12)
        noise = math.sqrt(((a - b) ** 2).sum()) / size
        assert comparison.noise_rel_l2 == pytest.approx(noise, rel=1e-12)


def test_float64_copy_is_float64_throughout(model):
    """Nothing in the more exact copy is left in float32, and the model itself is untouched."""
    exact = in_dtype(model, torch.float64)
    assert {p.dtype for p in exact.parameters()} == {torch.float64}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    half = in_dtype(model, torch.float16)
    wide = {name for name, p in half.named_parameters() if p.dtype == torch.float32}
    assert wide == {f"layers.{i}.{name}" for i in range(3) for name in ("dt_bias", "a_log", "d")}


CONFIGURATIONS = {
    "evit": {"method": "evit"},
    "pumer": {"method": "pumer"},
    "utrc-code": {"method": "utrc-code"},
    "all-logits": {"logits": "all"},
    "dense": {"schedule": schedule_of("none", ())},
    "last-layer": {"schedule": schedule_of(sites=(Site(layer=2, tokens_in=37, tokens_out=20),))},
    "tail": {"schedule": schedule_of(protect_tail=0, prune_permille=300)},
    "no-conv-bias": {"conv_bias": False, "tie_embeddings": False},
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_other_models_pass(name):
    """Any method, schedule and kind of model, against eager that sums in another order."""
    model = tiny_model(**CONFIGURATIONS[name])
    case = measure(model, eager_engine(model), [37, 31, 0])
    assert reasons(case) == ""
    assert len(case.sites) == len(model.schedule.sites)
    assert case.kept_exact


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_16_bit_engine_passes(model, dtype):
    """An engine that rounds as eager 16 bit does is within the noise floor, and flips little."""
    run = eager_engine(model, getattr(torch, dtype))
    case = measure(model, run, engine_dtype=dtype)
    assert reasons(case, SIXTEEN_BIT) == ""
    (logits,) = (t for t in case.tensors if t.name == "logits")
    assert logits.noise_rel_l2 > 3e-4  # else float32 would have been compared with itself
    assert f"eager {dtype}" in noise_of(dtype) and "float64" in noise_of("float32")
    # Held to what float32 can do it fails: the tolerance is what makes the difference.
    assert "logits is off" in reasons(case, FLOAT32)


def test_logits_of_padding_do_not_count():
    """An empty prompt has no last token: its logits may be anything, even NaN."""
    model = tiny_model()

    def poison(found):
        logits = found["logits"].copy()
        logits[1] = np.nan
        return logits

    run = damaged(eager_engine(model), logits=poison)
    assert reasons(measure(model, run, [37, 0])) == ""
    assert "logits holds 61 values that are NaN" in reasons(measure(model, run, [37, 1]))


def test_the_record_survives_json(model, onnx_run):
    """Stored and read again, a record is judged the same."""
    broken = damaged(onnx_run, logits=lambda found: found["logits"] * np.nan)
    for case in (measure(model, onnx_run), measure(model, broken)):
        record = record_of(case)
        again = msgspec.json.decode(msgspec.json.encode(record), type=ParityRecord)
        assert again == record
        assert judge_parity(again, FLOAT32) == judge_parity(record, FLOAT32)


# --- engines that are wrong ----------------------------------------------------------------------


def test_one_weight_perturbed(model):
    """The last taps of layer 1's convolution off by 2 %: so is all behind, and nothing before."""

    def change(array):
        array[:, -1] *= 1.02

    found = reasons(measure(model, ort_engine("layers.1.conv_weight", change), [37]))
    names = [line.split(": ")[1].split(" ")[0] for line in found.splitlines()]
    # The conv state is what goes into the convolution.
    assert names == [
        "logits", "present.ssm_state.1", "present.conv_state.2", "present.ssm_state.2",
    ]  # fmt: skip


def test_swapped_states(model, onnx_run):
    """The scan states of layers 0 and 2 in each other's place are named, and nothing else is."""
    run = damaged(
        onnx_run,
        present__ssm_state__0=lambda found: found["present.ssm_state.2"],
        present__ssm_state__2=lambda found: found["present.ssm_state.0"],
    )
    lines = reasons(measure(model, run)).splitlines()
    assert [line.split(": ")[1].split(" ")[0] for line in lines] == [
        "present.ssm_state.0", "present.ssm_state.2",
    ]  # fmt: skip


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nonfinite_logits(model, onnx_run, value):
    """One NaN among the logits fails them by name, with the count."""

    def poison(found):
        logits = found["logits"].copy()
        logits[0, 3] = value
        return logits

    case = measure(model, damaged(onnx_run, logits=poison))
    assert reasons(case).endswith("logits holds 1 values that are NaN or infinite")


def test_a_reported_choice_that_was_not_made(model, onnx_run):
    """The engine says it merged the other way: no score explains it, and the states disagree."""

    def turn(found):
        return ~found["choice.merge.1"]

    found = reasons(measure(model, damaged(onnx_run, choice__merge__1=turn), [37, 37]))
    assert "site 1, row 1: token" in found and "(merge); " in found
    assert "present.conv_state.2 is off" in found
    assert "site 0" not in found and "conv_state.1" not in found


def test_kept_positions_that_contradict_the_choices(model, onnx_run):
    """kept_positions must be what the engine's own choices leave, to the last integer."""

    def shift(found):
        kept = found["kept_positions"].copy()
        kept[0, 0] += 1
        return kept

    case = measure(model, damaged(onnx_run, kept_positions=shift))
    assert "kept_positions is off" in reasons(case)
    assert not case.kept_exact and case.kept_jaccard < 1


def put(value, row, column, array):
    """A change that writes one element of an output."""

    def change(found):
        changed = found[array].copy()
        changed[row, column] = value
        return changed

    return change


BROKEN = {
    "missing state": ({"present__ssm_state__1": None}, "present.ssm_state.1 is missing"),
    "missing logits": ({"logits": None}, "logits is missing"),
    "batch lost": (
        {"present__conv_state__2": lambda found: found["present.conv_state.2"][:1]},
        "present.conv_state.2 has shape [1, 112, 3], expected [3, 112, 3]",
    ),
    "int64": (
        {"kept_positions": lambda found: found["kept_positions"].astype(np.int64)},
        "kept_positions is int64, expected int32",
    ),
    "state in 16 bit": (
        {"present__ssm_state__0": lambda found: found["present.ssm_state.0"].astype(np.float16)},
        "present.ssm_state.0 is float16, expected float32",
    ),
    "missing choice": ({"choice__merge__0": None}, "choice.merge.0 is missing"),
    "outside": (
        {"choice__src__1": put(30, 0, -1, "choice.src.1")},
        "choice.src.1 removes position 30 in row 0, expected 0 to 29",
    ),
    "twice": (
        {"choice__src__0": lambda found: np.zeros_like(found["choice.src.0"])},
        "choice.src.0 lists position 0 after 0 in row 0, expected distinct positions in",
    ),
    "target outside": (
        {"choice__dst__0": put(-2, 2, 0, "choice.dst.0")},
        "choice.dst.0 merges into position -2 in row 2, expected -1 to 36",
    ),
    "target removed": (
        {"choice__dst__1": lambda found: found["choice.src.1"]},
        "choice.dst.1 merges into position",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_outputs_are_named(model, onnx_run, name):
    """An output that cannot be used is a reason by itself; what can be compared still is."""
    changes, reason = BROKEN[name]
    case = measure(model, damaged(onnx_run, **changes))
    assert reason in reasons(case)
    assert len(case.problems) == 1
    if "choice" in reason:
        assert (case.tensors, case.logits, case.kept_exact) == ((), None, False)
    else:
        (bad,) = case.problems
        compared = {comparison.name for comparison in case.tensors}
        assert bad not in compared and len(compared) == 7
        assert len(reasons(case).splitlines()) == 1
    record = record_of(case)
    assert msgspec.json.decode(msgspec.json.encode(record), type=ParityRecord) == record


# --- free choices --------------------------------------------------------------------------------


def nudged(amounts):
    """The importance op with ``amounts`` {position: amount} added where 37 tokens come in."""

    def token_importance(y):
        scores = PLAIN.token_importance(y).clone()
        if scores.shape[1] == LENGTH:
            for position, amount in amounts.items():
                scores[:, position] += amount
        return scores

    return token_importance


def free_choice(model, lengths):
    """What eager does at the first site."""
    with torch.no_grad():
        return model(*map(torch.from_numpy, prompts(lengths))).choices[0]


def forgetful_model():
    """A model whose first layer sees single tokens: equal ids have all but equal importance."""
    model = tiny_model(schedule=schedule_of("evit"))
    first = model.layers[0]
    first.conv_weight.data[:, :-1] = 0
    first.a_log.data[:] = 8.0  # the state is gone by the next token
    return model


def importance_at_first_site(model, ids):
    """Importance of the tokens of one full prompt where the first site sees them."""
    seen = []
    with torch.no_grad():
        tensors = torch.from_numpy(ids), torch.tensor([LENGTH], dtype=torch.int32)
        model(*tensors, None, lambda index, y, hidden, pads: seen.append(y))
    return CUSTOM.token_importance(seen[0])[0].numpy()


def test_a_near_tie_is_explained_and_a_large_margin_is_not():
    """Two tokens with equal ids around the boundary may swap; two with other ids may not."""
    model = forgetful_model()
    ids, lengths = prompts([LENGTH])
    order = np.argsort(importance_at_first_site(model, ids)[:-1], kind="stable")
    # The 7 lowest go. Give the 7th's id to the 8th: now these two tie but for rounding.
    inside, outside, far = order[6], order[7], order[20]
    ids[0, outside] = ids[0, inside]
    scores = importance_at_first_site(model, ids)
    assert abs(scores[inside] - scores[outside]) < 1e-6 < scores[far] - scores[inside]
    first, second = sorted((inside, outside), key=lambda t: (scores[t], t))

    tie = eager_engine(
        model, chunk_size=16, token_importance=nudged({first: 1e-6, second: -1e-6})
    )
    case = measure_case(model, tie, "prefill-37", ids, lengths, "a near tie")
    # The noise is of the size of a unit in the last place; that is all the two lie apart.
    flips = {(flip.position, flip.what): flip.margin for flip in case.sites[0].flips}
    assert flips.keys() == {(first, "kept"), (second, "removed")}
    assert max(flips.values()) <= EXPLAINED
    assert reasons(case) == ""
    assert not case.kept_exact and case.sites[0].same_source == pytest.approx(6 / 8)

    wrong = eager_engine(model, chunk_size=16, token_importance=nudged({far: -10.0}))
    case = measure_case(model, wrong, "prefill-37", ids, lengths, "far apart")
    (removed,) = (flip for flip in case.sites[0].flips if flip.what == "removed")
    assert (removed.position, removed in unexplained(case)) == (far, True)
    # The numbers agree, for the choice was replayed: only the flip speaks against the engine.
    assert f"token {far} differs (removed)" in reasons(case)
    assert "is off" not in reasons(case)


def test_margin_is_the_distance_in_units_of_the_noise():
    """The margin of a flip is that of float64 scores, divided by what float32 differs from them."""
    model = tiny_model(schedule=schedule_of("evit"))
    ids, lengths = prompts([LENGTH])
    narrow = importance_at_first_site(model, ids)
    wide = importance_at_first_site(in_dtype(model, torch.float64), ids)
    order = np.argsort(wide[:-1], kind="stable")
    last, far = order[6], order[9]
    run = eager_engine(model, token_importance=nudged({far: -10.0}))
    case = measure_case(model, run, "prefill-37", ids, lengths, "one too many")
    noise = np.abs(narrow - wide).max()
    assert case.sites[0].importance_noise == pytest.approx(noise, rel=1e-9)
    flips = {flip.what: flip for flip in case.sites[0].flips}
    assert (flips["removed"].position, flips["kept"].position) == (far, last)
    assert flips["removed"].margin == pytest.approx((wide[far] - wide[last]) / noise, rel=1e-9)
    assert flips["kept"].margin == pytest.approx((wide[order[7]] - wide[last]) / noise, rel=1e-9)


def test_padding_makes_no_noise():
    """Whatever stands in the padding, and however large, the noise is that of prompt tokens."""
    model = tiny_model()
    model.embedding.weight.data[0] *= 1e6
    ids, lengths = prompts([33, 25])
    ids[ids == 0] = 1
    noises = []
    for padding in (0, 1):
        for row, length in zip(ids, lengths, strict=True):
            row[: LENGTH - length] = padding
        case = measure_case(model, eager_engine(model), "prefill-37", ids, lengths, "padded")
        noises += [(site.importance_noise, site.similarity_noise) for site in case.sites]
    assert noises[:2] == noises[2:]
    assert min(min(pair) for pair in noises) > 0


def test_sites_are_compared_on_the_same_tokens(model):
    """After another choice at site 0, site 1 is asked about the tokens the engine had there."""
    removed = free_choice(model, [37]).src[0, :2].tolist()
    run = eager_engine(model, token_importance=nudged({t: 10.0 for t in removed}))
    case = measure(model, run, [37])
    assert {(t, "kept") for t in removed} <= {(f.position, f.what) for f in case.sites[0].flips}
    assert case.sites[1].flips == ()
    assert not case.kept_exact  # while eager left to itself goes elsewhere
    assert 0.5 < case.kept_jaccard < 1


def test_wrong_targets_are_not_explained(model):
    """An engine that matches on something else is replayed without error, but not believed."""

    def token_match(hidden, lower, upper):
        return PLAIN.token_match(hidden.flip(2) * torch.arange(32.0), lower, upper)

    case = measure(model, eager_engine(model, token_match=token_match), [37])
    assert "(target); " in reasons(case) and "is off" not in reasons(case)


def test_the_fixed_pattern_cannot_flip():
    """utrc-code decides by positions alone: any other choice is an error."""
    model = tiny_model("utrc-code")

    def token_stride(pads, length, removed):
        src, dst, merge, _ = PLAIN.token_stride(pads, length, removed)
        src = torch.where(src == 2, 3, src)
        return src, dst, merge, PLAIN.token_stride(pads, length, removed)[3]

    case = measure(model, eager_engine(model, token_stride=token_stride), [37])
    assert {flip.margin for flip in case.sites[0].flips} == {None}
    assert "no rounding of scores leads there" in reasons(case)


def test_numeric_errors_behind_equal_choices(model):
    """A merge that forgets to divide makes the layer after the site wrong, not the choice."""

    def token_reduce(hidden, residual, keep, src, dst, merge):
        hidden, residual = PLAIN.token_reduce(hidden, residual, keep, src, dst, merge)
        return hidden, residual * 1.001

    found = reasons(measure(model, eager_engine(model, token_reduce=token_reduce), [37]))
    assert "present.conv_state.1 is off" in found and "_state.0 is off" not in found


# --- requests that cannot be meant ---------------------------------------------------------------


def test_the_baseline_must_be_float32(model):
    """A 16-bit baseline would hide what 16 bit does."""
    with pytest.raises(InvalidRequest, match=r"torch\.float16, expected float32"):
        measure(in_dtype(model, torch.float16), eager_engine(model))


def test_the_schedule_must_be_of_the_prompts_length(model):
    """Prompts of another width belong to another bucket."""
    ids, lengths = prompts([37])
    with pytest.raises(InvalidRequest, match=r"36 tokens wide, but .* for 37"):
        measure_case(model, eager_engine(model), "prefill-36", ids[:, 1:], lengths, "cut")


def test_the_baseline_may_be_anywhere(model):
    """Its device is no matter; its precision and its schedule are."""
    elsewhere = tiny_model().to("meta")
    assert _schedule_of(elsewhere, 37) == _schedule_of(model, 37) == model.schedule
    with pytest.raises(InvalidRequest, match=r"torch\.float64, expected float32"):
        _schedule_of(tiny_model().double(), 37)


@pytest.mark.parametrize("allowed", [True, False])
def test_sums_in_16_bit_are_off_for_the_noise_floor_alone(model, monkeypatch, allowed):
    """A GPU's baseline is timed in the same process later, and must run as it always does."""
    matmul, seen = torch.backends.cuda.matmul, []
    names = [f"allow_{kind}_reduced_precision_reduction" for kind in ("fp16", "bf16")]
    before = [getattr(matmul, name) for name in names]

    def watched(copy, *arguments):
        seen.append((copy.embedding.weight.dtype, [getattr(matmul, name) for name in names]))
        return replay(copy, *arguments)

    monkeypatch.setattr(parity, "replay", watched)
    try:
        for name in names:
            setattr(matmul, name, allowed)
        measure(model, eager_engine(model, torch.float16), engine_dtype="float16")
        assert dict(seen) == {
            torch.float32: [allowed, allowed], torch.float16: [False, False]
        }  # fmt: skip
        assert [getattr(matmul, name) for name in names] == [allowed, allowed]
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(matmul, name, value)


def test_a_model_without_a_schedule_is_dense():
    """No schedule is the schedule without sites."""
    model = tiny_model()
    model.schedule = None
    case = measure(model, eager_engine(model))
    assert reasons(case) == "" and case.sites == ()


def test_ops_of_the_baseline_are_kept():
    """The copies in other precisions run on the ops of the model."""
    model = tiny_model()
    model.ops = dataclasses.replace(PLAIN)
    assert in_dtype(model, torch.float64).ops is model.ops
    assert reasons(measure(model, eager_engine(model))) == ""
