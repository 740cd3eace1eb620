"""What the kernel benchmark runs: each op at the sizes of real models, with its floor.

A floor is the fewest bytes (every input read once, every output written once) and the fewest
matrix operations that give the op's result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from tokred_plugins import opset
from tokred_plugins.cuda import known_of
from tokred_plugins.kernels import Call, Spec, Tactic, torch_dtypes

NO_LIMIT = 3.4e38
VOCABULARY = 50288  # of the published models, rows of padding included
SCANS = ("ssd_scan", "ssd_scan_gated", "ssd_scan_scored")


@dataclass(frozen=True)
class Model:
    """Sizes of one Mamba-2 model; G is 1."""

    name: str
    width: int
    heads: int
    head_dim: int = 64
    states: int = 128

    @property
    def inner(self) -> int:
        return self.heads * self.head_dim

    @property
    def channels(self) -> int:
        return self.inner + 2 * self.states

    @property
    def columns(self) -> int:
        return self.inner + self.channels + self.heads


MODELS = {m.name: m for m in (Model("130m", 768, 24), Model("780m", 1536, 48),
                              Model("2.7b", 2560, 80))}


@dataclass(frozen=True)
class Case:
    """One op at one size.

    Attributes:
        op: name in ``OpSet``.
        inputs: spec of each tensor; None for an absent one.
        attributes: what follows the tensors in the op's signature.
        calls: takes the input specs, the attributes and ``tactics=``; returns the launches.
        outputs: names of the op's results among what the launches write, in order.
        operations: matrix operations of the floor.
        needed: bytes of inputs, where not all of each tensor is read.
        plain: what is computed, where it is no op of the model.
    """

    op: str
    inputs: dict[str, Spec | None]
    attributes: tuple
    calls: Callable[..., tuple[Call, ...]]
    outputs: tuple[str, ...]
    operations: float = 0.0
    needed: float | None = None
    plain: Callable[..., torch.Tensor] | None = None

    def launches(self, tactics: dict[str, Tactic] | None = None, **options: int) -> tuple:
        """The calls with these tactics."""
        return self.calls(*self.inputs.values(), *self.kernel_attributes, tactics=tactics,
                          **options)

    @property
    def kernel_attributes(self) -> tuple:
        """The attributes without the eager op's chunk size, which the kernels do not take."""
        if self.op not in SCANS:
            return self.attributes
        groups, states, _, low, high = self.attributes
        return groups, states, low, high

    def bytes(self) -> float:
        """Fewest bytes moved."""
        read = self.needed
        if read is None:
            read = sum(size(spec) for spec in self.inputs.values() if spec is not None)
        written = {name: spec for call in self.launches() for name, spec in call.outputs.items()}
        return read + sum(size(written[name]) for name in self.outputs)

    def eager(self, tensors: dict) -> tuple[torch.Tensor, ...]:
        """The op's plain PyTorch function."""
        function = self.plain or getattr(opset.PLAIN, self.op)
        made = function(*tensors.values(), *self.attributes)
        return made if isinstance(made, tuple) else (made,)


def this_gpu() -> dict[str, int]:
    """What launches are chosen for, where there is a GPU."""
    return known_of(torch.device("cuda", 0)) if torch.cuda.is_available() else {}


def size(spec: Spec) -> int:
    """Bytes of a tensor."""
    width = torch_dtypes()[spec.dtype].itemsize
    for n in spec.shape:
        width *= n
    return width


def cases(
    model: Model, batch: int, length: int, dtype: str, ops: set[str] | None = None
) -> Iterator[Case]:
    """All ops of one model at one size; the products of a layer only where they are named."""
    sizes = (model, batch, length, dtype)
    for case in (
        *layer_cases(*sizes), *site_cases(*sizes), *(product_cases(*sizes) if ops else ())
    ):
        if not ops or case.op in ops:
            yield case


def layer_cases(m: Model, batch: int, length: int, dtype: str) -> Iterator[Case]:
    """What every layer runs."""
    from tokred_plugins.add_rms_norm import kernel as add_norm
    from tokred_plugins.causal_conv1d import kernel as conv
    from tokred_plugins.embed_rms_norm import kernel as embed
    from tokred_plugins.gated_rms_norm import kernel as gated_norm
    from tokred_plugins.ssd_scan import launches as scan

    def wide(*shape: int) -> Spec:
        return Spec(shape, "fp32")

    def x(*shape: int) -> Spec:
        return Spec(shape, dtype)

    rows, two = batch * length, 2
    pads = Spec((batch,), "i32")
    packed = x(batch, length, m.columns)
    yield Case(
        "add_rms_norm",
        {"hidden": x(batch, length, m.width), "residual": wide(batch, length, m.width),
         "weight": x(m.width)},
        (1e-5,), add_norm.calls, ("normed", "residual_out"),
    )
    yield Case(
        "embed_rms_norm",
        {"input_ids": Spec((batch, length), "i32"), "table": x(VOCABULARY, m.width),
         "weight": x(m.width)},
        (1e-5, True), embed.calls, ("normed", "residual"), needed=rows * (m.width * two + 4),
    )
    yield Case(
        "gated_rms_norm",
        {"y": x(batch, length, m.inner), "zxbcdt": packed, "weight": x(m.inner)},
        (m.inner, 1e-5, False), gated_norm.calls, ("out",), needed=rows * m.inner * 2 * two,
    )
    yield Case(
        "causal_conv1d",
        {"zxbcdt": packed, "weight": x(m.channels, 4), "bias": x(m.channels), "pads": pads},
        (m.inner,), conv.calls, ("y", "state"), needed=rows * m.channels * two,
    )
    chunk = 64
    per_token = m.heads * (2 * chunk * m.head_dim + 4 * m.states * m.head_dim)
    plain = Case(
        "ssd_scan",
        {"xbc": x(batch, length, m.channels), "zxbcdt": packed, "dt_bias": wide(m.heads),
         "a_log": wide(m.heads), "d": wide(m.heads), "pads": pads, "initial_state": None},
        (1, m.states, 256, 0.0, NO_LIMIT), partial(scan.calls, **this_gpu()), ("y", "state"),
        operations=rows * (per_token + 2.0 * chunk * m.states),
        needed=rows * (m.channels + m.heads) * two,
    )
    yield plain
    if this_gpu().get("target") == 90 and dtype != "fp32":  # there is a kernel of no other kind
        gates = partial(scan.calls, **this_gpu(), segments=1, scratch=True, gated=True)
        gated = replace(  # reads z too
            plain, op="ssd_scan_gated", calls=gates, outputs=("gated", "squares", "state"),
            needed=plain.needed + rows * m.inner * two, plain=gated_scan,
        )
        yield gated
        yield replace(
            gated, op="ssd_scan_scored", calls=partial(gates, scored=True),
            outputs=(*gated.outputs, "relus"), plain=scored_scan,
        )


def gated_scan(*given: object) -> tuple:
    """The scan's y times silu(z), the sums of its squares over each head, and the last state."""
    return scored_scan(*given)[:-1]


def scored_scan(xbc: torch.Tensor, zxbcdt: torch.Tensor, *others: object) -> tuple:
    """:func:`gated_scan`, and the mean of max(0, y) over each head."""
    y, state = opset.PLAIN.ssd_scan(xbc, zxbcdt, *others)
    gated = y * F.silu(zxbcdt[:, :, : y.shape[2]])
    heads, parts = (x.unflatten(2, (state.shape[1], -1)) for x in (gated, y))
    return gated, heads.square().sum(3), state, parts.relu().mean(3)


PRODUCTS = ("first_product", "second_product", "second_product_scaled")


def product_cases(m: Model, batch: int, length: int, dtype: str) -> Iterator[Case]:
    """The two projections of a layer, their weights stored as engines have them; the second also
    as it is after a gated scan, whose rows it divides by their root mean square."""
    from tokred_plugins.linear import kernel as linear

    first, second, scaled = PRODUCTS
    for op, inner, columns in ((first, m.width, m.columns), (second, m.inner, m.width)):
        product = Case(
            op,
            {"x": Spec((batch, length, inner), dtype), "weight": Spec((columns, inner), dtype)},
            (True,), linear.calls, ("y",), operations=2.0 * batch * length * inner * columns,
            plain=lambda x, weight, turned: x @ weight.T,
        )
        yield product
    squares = Spec((batch, length, m.heads), "fp32")
    yield replace(
        product, op=scaled, inputs={**product.inputs, "squares": squares},
        attributes=(True, 1e-5), calls=scaled_calls, plain=scaled_product,
    )


def scaled_calls(
    x: Spec, weight: Spec, squares: Spec, turned: bool, eps: float,
    tactics: dict[str, Tactic] | None = None,
) -> tuple[Call, ...]:
    """The launch of a product with the sums of squares that come with its rows."""
    from tokred_plugins.linear import kernel as linear

    return linear.calls(x, weight, turned, tactics=tactics, squares=squares, eps=eps)


def scaled_product(
    x: torch.Tensor, weight: torch.Tensor, squares: torch.Tensor, turned: bool, eps: float
) -> torch.Tensor:
    """Rows divided by their root mean square, as ``squares`` tell it, times the weight."""
    return x @ weight.T * torch.rsqrt(squares.sum(2, keepdim=True) / x.shape[2] + eps)


def site_cases(m: Model, batch: int, length: int, dtype: str) -> Iterator[Case]:
    """What one reduction site runs; a sixth of the tokens goes."""
    from tokred_plugins.token_importance import kernel as importance
    from tokred_plugins.token_link import kernel as link
    from tokred_plugins.token_match import kernel as match
    from tokred_plugins.token_reduce import kernel as reduce
    from tokred_plugins.token_split import kernel as split

    half, removed = length // 2, length // 6
    other = length - half

    def ints(*shape: int) -> Spec:
        return Spec((batch, *shape), "i32")

    hidden = Spec((batch, length, m.width), dtype)
    pads = Spec((batch,), "i32")
    yield Case(
        "token_importance", {"y": Spec((batch, length, m.inner), dtype)}, (),
        importance.calls, ("scores",),
    )
    splitting = Case(
        "token_split", {"scores": Spec((batch, length), "fp32"), "pads": pads}, (half, 1),
        split.calls, ("lower", "upper"),
    )
    yield splitting
    yield replace(
        splitting, op="token_split_norm", inputs={**splitting.inputs, "hidden": hidden},
        calls=split_norm_calls, outputs=("lower", "upper", "inverse"), plain=split_norm,
    )
    yield Case(
        "token_match", {"hidden": hidden, "lower": ints(half), "upper": ints(other)}, (),
        partial(match.calls, target=this_gpu().get("target")), ("similarity", "target"),
        operations=2.0 * batch * half * other * m.width,
    )
    yield Case(
        "token_link",
        {"similarity": Spec((batch, half), "fp32"), "target": ints(half), "lower": ints(half),
         "upper": ints(other), "pads": pads},
        (removed, 500), link.calls, ("src", "dst", "merge", "keep"),
    )
    merging = Case(
        "token_reduce",
        {"hidden": hidden, "residual": Spec((batch, length, m.width), "fp32"),
         "keep": ints(length - removed), "src": ints(removed), "dst": ints(removed),
         "merge": Spec((batch, removed), "i1")},
        (), reduce.calls, ("hidden_out", "residual_out"),
    )
    yield merging
    weight = Spec((m.width,), dtype)
    yield replace(
        merging, op="token_reduce_norm", inputs={**merging.inputs, "weight": weight},
        attributes=(1e-5,), calls=reduce_norm_calls, outputs=("normed", "residual_out"),
        plain=reduce_norm,
    )


def split_norm_calls(
    scores: Spec, pads: Spec, hidden: Spec, count: int, protect: int,
    tactics: dict[str, Tactic] | None = None, search: bool | None = None,
) -> tuple[Call, ...]:
    """The launches of a site's split with the norms that matching needs."""
    from tokred_plugins.token_split import kernel as split

    return split.calls(scores, pads, count, protect, tactics, search, hidden)


def split_norm(
    scores: torch.Tensor, pads: torch.Tensor, hidden: torch.Tensor, count: int, protect: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Both halves, and one over each token's norm."""
    return *opset.PLAIN.token_split(scores, pads, count, protect), 1 / hidden.norm(dim=2)


def reduce_norm_calls(
    *specs_and_eps: Spec | float, tactics: dict[str, Tactic] | None = None
) -> tuple[Call, ...]:
    """The launch of a site's merging with the norm after it."""
    from tokred_plugins.token_reduce import kernel as reduce

    *specs, weight, eps = specs_and_eps
    return reduce.calls(*specs, tactics=tactics, weight=weight, eps=eps)


def reduce_norm(*tensors_and_eps: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Both branches merged, summed and normalised."""
    *given, weight, eps = tensors_and_eps
    return opset.PLAIN.add_rms_norm(*opset.PLAIN.token_reduce(*given), weight, eps)


def tensors(case: Case, seed: int) -> dict[str, torch.Tensor | None]:
    """Random inputs of a case on the GPU: values as a trained model has them in size."""
    random = torch.Generator("cuda").manual_seed(seed)
    dtypes = torch_dtypes()
    made: dict[str, torch.Tensor | None] = {}
    for name, spec in case.inputs.items():
        if spec is None:
            made[name] = None
        elif spec.dtype in ("i32", "i1"):
            made[name] = torch.zeros(spec.shape, dtype=dtypes[spec.dtype], device="cuda")
        else:
            values = torch.randn(spec.shape, generator=random, device="cuda")
            made[name] = values.to(dtypes[spec.dtype])
    if case.op in SCANS:  # dt around 0.01 to 0.1, A from -1 to -16
        made["dt_bias"].uniform_(-4.6, -2.3, generator=random)
        made["a_log"].uniform_(0.0, 2.77, generator=random)
    if "squares" in made:  # of each head's share of a row
        heads = made["squares"].shape[2]
        made["squares"] = made["x"].float().unflatten(2, (heads, -1)).square().sum(3)
    if "input_ids" in made:
        made["input_ids"].random_(0, VOCABULARY, generator=random)
    if "lower" in made:
        _fill_split(made, random)
    if "keep" in made:
        _fill_choice(made, random)
    return made


def _fill_split(made: dict, random: torch.Generator) -> None:
    batch, half = made["lower"].shape
    other = made["upper"].shape[1]
    order = torch.rand(batch, half + other, generator=random, device="cuda").argsort(dim=1)
    made["lower"] = order[:, :half].sort(dim=1).values.int()
    made["upper"] = order[:, half:].sort(dim=1).values.int()
    if "target" in made:
        best = torch.randint(other, (batch, half), generator=random, device="cuda")
        made["target"] = made["upper"].gather(1, best)
        made["similarity"] = made["similarity"].clamp(-1, 1)


def _fill_choice(made: dict, random: torch.Generator) -> None:
    batch, removed = made["src"].shape
    kept = made["keep"].shape[1]
    order = torch.rand(batch, removed + kept, generator=random, device="cuda").argsort(dim=1)
    made["src"] = order[:, :removed].sort(dim=1).values.int()
    made["keep"] = order[:, removed:].sort(dim=1).values.int()
    # A third as many targets as sources: some have several.
    best = torch.randint(max(removed // 3, 1), (batch, removed), generator=random, device="cuda")
    made["dst"] = made["keep"].gather(1, best * 3 % kept)
    made["merge"] = torch.rand(batch, removed, generator=random, device="cuda") < 0.5
