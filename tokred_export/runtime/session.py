"""Runs a bundle: prompts in, logits and states out, all numpy, no PyTorch.

    session = Session.open("out")
    result = session.prefill([[5, 17, 3], [8, 1]])
    result.logits          # [2,V], the token after each prompt
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tokred_export.bundle import Bundle, read_bundle, verify_files
from tokred_export.errors import BundleError, InvalidRequest
from tokred_export.manifest import Component
from tokred_export.runtime.ort import Device
from tokred_export.runtime.runner import EngineUse, Runner, close, open_runner

Prompts = Sequence[Sequence[int]] | np.ndarray


class ChoiceArrays(NamedTuple):
    """What one reduction site chose: src and dst int32 [B,r], merge bool [B,r]."""

    src: np.ndarray
    dst: np.ndarray
    merge: np.ndarray


class PrefillResult(NamedTuple):
    """What a prefill leaves behind.

    ``logits`` is [B,V], or [B,L_out,V] in a bundle built with all logits; ``kept_positions``
    int32 [B,L_out], indices into the prompt, -1 for padding; ``conv_states`` [B,C,K-1] and
    ``ssm_states`` float32 [B,H,P,N] run over layers; ``component`` is the graph that ran.
    """

    logits: np.ndarray
    kept_positions: np.ndarray
    choices: tuple[ChoiceArrays, ...]
    conv_states: tuple[np.ndarray, ...]
    ssm_states: tuple[np.ndarray, ...]
    component: str


class Session:
    """A bundle that is open for running; graphs are loaded when first needed. For any thread."""

    def __init__(
        self,
        bundle: Bundle,
        backend: str = "onnxruntime",
        device: Device = "cpu",
        threads: int | None = None,
        engine: EngineUse = "auto",
    ) -> None:
        self.bundle = bundle
        self._how = (backend, device, threads, engine)
        self._runners: dict[str, Runner] = {}
        self._opening = threading.Lock()

    def close(self) -> None:
        """Give back the memory and processes of engines; they are opened again when needed."""
        with self._opening:
            while self._runners:
                close(self._runners.popitem()[1])

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @classmethod
    def open(
        cls,
        path: str | Path,
        backend: str = "onnxruntime",
        device: Device = "cpu",
        threads: int | None = None,
        engine: EngineUse = "auto",
    ) -> Session:
        """Check a bundle's schema and the hashes of everything but its reports, and open it.

        Args:
            path: the bundle's folder.
            backend: what runs it: "onnxruntime", or "tensorrt" on the GPU it was built on.
            device: "cpu" or "cuda".
            threads: CPU threads; None lets the backend choose.
            engine: whether to use the bundle's own engines, see `open_runner`.

        Raises:
            InvalidRequest: no folder at ``path``, or no such backend.
            BundleError: the bundle is damaged, of another schema, or fits no prefill.
            EnvironmentUnable: the backend or device is missing here.
        """
        bundle = read_bundle(Path(path))
        verify_files(bundle, skip=("reports/",))
        session = cls(bundle, backend, device, threads, engine)
        # The smallest graph at once, so that a backend that cannot run fails here.
        session.runner(session._buckets()[0][0])
        return session

    def runner(self, component: str) -> Runner:
        """The runner of one component, opened on first use; the level below `prefill`."""
        with self._opening:
            if component not in self._runners:
                self._runners[component] = open_runner(self.bundle, component, *self._how)
            return self._runners[component]

    def prefill(self, prompts: Prompts) -> PrefillResult:
        """Run prompts through the smallest graph that holds the longest of them.

        Args:
            prompts: one row of token ids for each prompt, of any lengths. An empty row is
                allowed; its logits mean nothing.

        Returns:
            Arrays with one row for each prompt.

        Raises:
            InvalidRequest: no prompts, too many, one that is too long, or an id outside the
                vocabulary.
            EnvironmentUnable: the backend failed while running.
        """
        rows = _as_rows(prompts, self.bundle.manifest.spec.model.vocab_size)
        name, component = self._choose(max(len(row) for row in rows))
        feeds = self._feeds(name, component, rows)
        values = self.runner(name).run(feeds)
        return self._result(name, {key: array[: len(rows)] for key, array in values.items()})

    def _buckets(self) -> list[tuple[str, Component]]:
        """Prefill components, shortest first."""
        components = self.bundle.manifest.components.items()
        found = [item for item in components if item[1].metadata.phase == "prefill"]
        if not found:
            raise BundleError(f"{self.bundle.path} has no prefill component: build it again")
        return sorted(found, key=lambda item: item[1].metadata.seq_len)

    def _choose(self, length: int) -> tuple[str, Component]:
        buckets = self._buckets()
        for name, component in buckets:
            if length <= component.metadata.seq_len:
                return name, component
        longest = buckets[-1][1].metadata.seq_len
        raise InvalidRequest(
            f"a prompt has {length} tokens, and the longest graph of this bundle takes {longest}: "
            "shorten it, or build with a larger --seq-len"
        )

    def _feeds(
        self, name: str, component: Component, rows: list[np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Left-padded int32 ids [B,L] and lengths [B]; spare rows of a static batch are empty."""
        metadata, io = component.metadata, self.bundle.manifest.io[name]
        if len(rows) > metadata.max_batch:
            raise InvalidRequest(
                f"{len(rows)} prompts were given, and {name} takes at most {metadata.max_batch}: "
                "send fewer at a time, or build with a larger --max-batch"
            )
        batch = len(rows) if metadata.dynamic_batch else metadata.max_batch
        ids = np.zeros((batch, metadata.seq_len), np.int32)
        lengths = np.zeros(batch, np.int32)
        for index, row in enumerate(rows):
            lengths[index] = len(row)
            ids[index, metadata.seq_len - len(row) :] = row
        return {io.input_ids: ids, io.prompt_len: lengths}

    def _result(self, name: str, values: dict[str, np.ndarray]) -> PrefillResult:
        io = self.bundle.manifest.io[name]
        return PrefillResult(
            logits=values[io.logits],
            kept_positions=values[io.kept_positions],
            choices=tuple(
                ChoiceArrays(values[site.src], values[site.dst], values[site.merge])
                for site in io.choices
            ),
            conv_states=tuple(values[state] for state in io.conv_states),
            ssm_states=tuple(values[state] for state in io.ssm_states),
            component=name,
        )


def _as_rows(prompts: Prompts, vocab_size: int) -> list[np.ndarray]:
    """Each prompt as a checked array of ids."""
    try:
        rows = None if isinstance(prompts, str | bytes) else list(prompts)
    except TypeError:  # None, a number, an array without dimensions
        rows = None
    if rows is None:
        raise InvalidRequest(
            f"prompts are of type {type(prompts).__name__}, expected a list of rows of token ids: "
            "tokenize text first, and put a single prompt in a list"
        )
    if not rows:
        raise InvalidRequest("no prompts were given, expected at least one row of token ids")
    return [_as_row(prompt, index, vocab_size) for index, prompt in enumerate(rows)]


def _as_row(prompt: Sequence[int], index: int, vocab_size: int) -> np.ndarray:
    try:
        row = np.asarray(prompt)
    except ValueError as error:  # rows within a row, of different lengths
        raise InvalidRequest(
            f"prompt {index} is nested, expected one row of integer token ids: flatten it"
        ) from error
    if row.ndim == 1 and row.size == 0:
        return row.astype(np.int32)
    if row.ndim != 1 or row.dtype.kind not in "iu":
        raise InvalidRequest(
            f"prompt {index} is {row.dtype} of shape {list(row.shape)}, expected one row of "
            "integer token ids: tokenize text first, and put a single prompt in a list"
        )
    wrong = np.flatnonzero((row < 0) | (row >= vocab_size))
    if wrong.size:
        raise InvalidRequest(
            f"prompt {index} has the id {row[wrong[0]]} at position {wrong[0]}, and the model "
            f"knows 0 to {vocab_size - 1}: use the tokenizer that lies in the bundle"
        )
    return row.astype(np.int32)
