"""The training loop: tokens stay on the device, the learning rate follows time or steps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from demo_training.corpus import END_ID
from demo_training.model import DemoConfig, DemoModel

WARM_UP = 0.04  # share of the run in which the learning rate rises
FINAL_RATE = 0.02  # of the peak
FILE_START_SHARE = 1 / 16  # windows that begin exactly where a file does
FIRST_VALIDATION, VALIDATION_EVERY = 0.3, 0.05  # shares of the run
LOG_SECONDS = 10.0


@dataclass(frozen=True)
class TrainOptions:
    """What a run may choose; it ends at whichever of the limits comes first."""

    steps: int | None = None
    minutes: float | None = None
    epochs: float | None = None
    window: int = 2048
    batch_tokens: int = 65536
    lr: float = 3e-3
    weight_decay: float = 0.1
    dropout: float = 0.1
    compile: bool = False
    seed: int = 0


@dataclass(frozen=True)
class TrainResult:
    """How a run went; the best step is the one whose weights were kept."""

    steps: int
    tokens: int
    epochs: float
    seconds: float
    best_step: int
    validation_bits_per_byte: float


def join_files(files: list[np.ndarray], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """All files in a random order, each after an end token, and a last end token.

    Returns:
        the stream, int32 [n], and where each file's end token stands, int64 [files].
    """
    order = np.random.default_rng(seed).permutation(len(files))
    parts = [part for index in order for part in ([END_ID], files[index])]
    starts = np.cumsum([0] + [len(files[index]) + 1 for index in order[:-1]])
    return np.concatenate([*parts, [END_ID]]).astype(np.int32), starts


def batches_of_offsets(
    length: int, starts: Tensor, window: int, rows: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Where a batch's windows begin, int64 [rows], without end.

    Every epoch cuts the stream at a new random phase, so windows start anywhere in a file, and
    adds windows that begin where a file does. The state is zero at a window's start and every
    position is trained, so the first positions of each window are the short prompts: windows of
    several lengths would add nothing to a causal model.
    """
    waiting = torch.empty(0, dtype=torch.int64)
    starts = starts[starts + window < length]
    while True:
        phase = int(torch.randint(min(window, length - window), (1,), generator=generator))
        cut = torch.arange(phase, length - window, window)
        if extra := math.ceil(len(cut) * FILE_START_SHARE) if len(starts) else 0:
            drawn = torch.randint(len(starts), (extra,), generator=generator)
            cut = torch.cat([cut, starts[drawn]])
        waiting = torch.cat([waiting, cut[torch.randperm(len(cut), generator=generator)]])
        while len(waiting) >= rows:
            yield waiting[:rows]
            waiting = waiting[rows:]


def rate_scale(progress: float) -> float:
    """Learning rate over its peak: a linear rise, then a cosine down to FINAL_RATE."""
    if progress < WARM_UP:
        return max(progress, WARM_UP / 100) / WARM_UP
    fall = min(1.0, (progress - WARM_UP) / (1 - WARM_UP))
    return FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * fall))


def make_optimizer(model: DemoModel, options: TrainOptions) -> torch.optim.AdamW:
    """AdamW that decays the matrices and leaves norms, biases, conv, A, D and dt alone."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    groups = [
        {"params": matrices, "weight_decay": options.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    fused = next(model.parameters()).is_cuda
    return torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.95), fused=fused)


def loss_of(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy in nats of the tied head."""
    return F.cross_entropy(F.linear(hidden, weight).float().flatten(0, 1), targets.flatten())


def rounded_copy(model: DemoModel) -> DemoModel:
    """The model as it will be shipped: weights rounded to float16, computing in float32."""
    shipped = DemoModel(model.config).to(next(model.parameters()).device)
    shipped.load_state_dict({name: t.half() for name, t in model.state_dict().items()})
    return shipped.eval().requires_grad_(False)


class Trainer:
    """One run's model, optimizer and batches; ``step`` trains on one batch."""

    def __init__(
        self, config: DemoConfig, files: list[np.ndarray], options: TrainOptions,
        device: torch.device,
    ) -> None:
        torch.manual_seed(options.seed)
        self.options, self.device = options, device
        self.model = DemoModel(config, options.dropout).to(device)
        self.optimizer = make_optimizer(self.model, options)
        stream, starts = join_files(files, options.seed)
        if len(stream) <= options.window:
            raise SystemExit(f"the training text has {len(stream)} tokens, expected more than the "
                             f"window of {options.window}: train on more files")
        self.stream = torch.from_numpy(stream).to(device)
        self.rows = max(1, options.batch_tokens // options.window)
        generator = torch.Generator().manual_seed(options.seed)
        self.offsets = batches_of_offsets(
            len(stream), torch.from_numpy(starts), options.window, self.rows, generator
        )
        self.reach = torch.arange(options.window + 1, device=device)
        self.loss = loss_of
        if options.compile:
            # One layer is compiled and serves all of them.
            for layer in self.model.backbone.layers:
                layer.compile()
            self.loss = torch.compile(loss_of)

    def step(self, progress: float) -> Tensor:
        """Train on one batch; returns its loss in nats per token, still on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.lr * rate_scale(progress)
        offsets = next(self.offsets).to(self.device, non_blocking=True)
        tokens = self.stream[offsets[:, None] + self.reach].long()
        backbone = self.model.backbone
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            hidden = backbone(tokens[:, :-1])
            loss = self.loss(hidden, backbone.embeddings.weight, tokens[:, 1:])
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.detach()


def train(
    trainer: Trainer,
    validate: Callable[[DemoModel], float],
    save: Callable[[DemoModel], object],
    log: Callable[[str], None],
) -> TrainResult:
    """Run until a limit is reached, saving the weights whenever validation improves.

    Args:
        trainer: ready to step.
        validate: bits per byte of a model on the validation files.
        save: writes a model's weights.
        log: takes one line of progress.

    Raises:
        SystemExit: no limit was given, or the loss is no longer finite.
    """
    options = trainer.options
    per_step = trainer.rows * options.window
    per_epoch = len(trainer.stream)
    limits = [options.steps] if options.steps else []
    if options.epochs:
        limits.append(math.ceil(options.epochs * per_epoch / per_step))
    if not limits and not options.minutes:
        raise SystemExit("no limit given: use --minutes, --steps or --epochs")
    max_steps = min(limits, default=None)
    seconds = options.minutes * 60 if options.minutes else math.inf

    log(f"{per_epoch} tokens an epoch, {per_step} a step; at most {max_steps} steps, {seconds} s")
    began = time.perf_counter()
    loss = trainer.step(0.0).item()
    log(f"first step took {time.perf_counter() - began:.1f} s, compiling included; loss {loss:.3f}")
    began = last_log = time.perf_counter()
    step, logged_step, best, best_step, due = 1, 1, math.inf, 0, FIRST_VALIDATION
    progress = 0.0
    while progress < 1:
        elapsed = time.perf_counter() - began
        progress = max(elapsed / seconds, step / max_steps if max_steps else 0.0)
        if progress < 1:
            tensor = trainer.step(progress)
            step += 1
            if step % 10 == 0:
                loss = tensor.item()  # also keeps the clock honest: waits for the device
                if not math.isfinite(loss):
                    raise SystemExit(f"the loss is {loss} at step {step}: lower --lr")
        now = time.perf_counter()
        if now - last_log > LOG_SECONDS:
            speed = (step - logged_step) * per_step / (now - last_log)
            log(f"step {step}  {100 * progress:.0f} %  epoch {step * per_step / per_epoch:.1f}  "
                f"loss {loss:.4f}  {speed / 1e3:.0f} k tokens/s")
            last_log, logged_step = now, step
        if progress >= min(due, 1.0):
            due += VALIDATION_EVERY
            shipped = rounded_copy(trainer.model)
            found = validate(shipped)
            log(f"step {step}  validation {found:.4f} bits per byte")
            if found < best:
                best, best_step = found, step
                save(shipped)
    tokens = step * per_step
    return TrainResult(
        step, tokens, tokens / per_epoch, time.perf_counter() - began, best_step, best
    )


def parameter_count(config: DemoConfig) -> int:
    """Parameters of the model, the tied head counted once."""
    with torch.device("meta"):
        return sum(p.numel() for p in DemoModel(config).parameters())
