"""Tactics are timed on the device that is there, once, and remembered."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

import numpy as np
from tokred_plugins import aot
from tokred_plugins.kernels import Spec
from tokred_plugins.linear import kernel as linear
from tokred_plugins.retune import candidates

from tokred_export.backends import tune
from tokred_export.errors import BuildFailed


class FakeDevice:
    """Times are decided by the block of the code that was launched last."""

    fastest = 256  # threads
    loads = 0
    cuda_version = 13000
    wrong = ()  # blocks whose code leaves the output as it was

    def __init__(self):
        self.launched = []
        self.memory = {}
        FakeDevice.loads = 0

    def load_kernel(self, ptx, entry, shared):
        FakeDevice.loads += 1
        return ptx, entry

    def unload_kernel(self, kernel):
        FakeDevice.loads -= 1

    def allocate(self, size):
        address = 4096 * (len(self.memory) + 1)
        self.memory[address] = size
        return address

    def free(self, address):
        del self.memory[address]

    def upload(self, array, address):
        assert array.nbytes == self.memory[address]
        assert np.count_nonzero(array) > array.size // 2  # zeros would run too fast

    def launch(self, kernel, grid, block, shared, arguments):
        self.launched.append((grid, block, arguments))
        if block not in FakeDevice.wrong:
            self.value = 0x3C  # 0x3C3C is a float16 near one

    def fill(self, address, value, size):
        assert size <= self.memory[address]
        self.value = value

    def synchronize(self):
        pass

    def download(self, address, array):
        array[:] = self.value

    def elapsed_ms(self, work):
        work()
        grid, block, _ = self.launched[-1]
        return 1.0 + abs(block - self.fastest) + grid[0] * 1e-6


@pytest.fixture
def device(monkeypatch):
    made = []
    monkeypatch.setattr(tune, "Device", lambda: made.append(FakeDevice()) or made[-1])
    return made


@pytest.fixture(autouse=True)
def compiled_once(monkeypatch):
    """Code that an earlier test had is not compiled again: a second each, for two dozen."""
    compile_call = tune.compile_call

    def compile_new(call, sm):
        key = aot.compile_key(call), sm
        if key not in _COMPILED:
            try:
                _COMPILED[key] = compile_call(call, sm)
            except aot.DoesNotFit as refused:
                _COMPILED[key] = refused
        if isinstance(_COMPILED[key], Exception):
            raise _COMPILED[key]
        return _COMPILED[key]

    monkeypatch.setattr(tune, "compile_call", compile_new)


_COMPILED: dict = {}


def product(length, batch=2, columns=3352):
    """One launch of a projection."""
    return linear.calls(Spec((batch, length, 768), "fp16"), Spec((768, columns), "fp16"))[0]


def test_the_fastest_candidate_is_taken(device, tmp_path):
    """Of all tactics that can stand in; its grid is its own; the file says it."""
    file = tmp_path / "known" / "tactics.json"
    tuner = tune.Tuner(90, file)
    best = tuner.best(product(1500))
    assert best.tactic.num_warps * 32 == FakeDevice.fastest
    assert best in candidates(product(1500))
    assert list(json.loads(file.read_text()).values()) == [str(best.tactic)]
    tried = {block for _, block, _ in device[0].launched}
    assert len(tried) > 1
    grid, _, arguments = device[0].launched[0]
    assert grid[2] == 2 and arguments[2] == np.int32(1500)
    tuner.close()
    assert FakeDevice.loads == 0 and not device[0].memory


def test_squares_that_rows_are_divided_by(device, monkeypatch):
    """They are none that no row could have: of random signs, the root of their mean may be none."""
    uploaded = []
    upload = FakeDevice.upload
    monkeypatch.setattr(
        FakeDevice, "upload", lambda self, raw, at: uploaded.append(raw) or upload(self, raw, at)
    )
    (call,) = linear.calls(
        Spec((2, 700, 768), "fp16"), Spec((3352, 768), "fp16"), turned=True,
        squares=Spec((2, 700, 24), "fp32"), eps=1e-5,
    )
    best = tune.Tuner(90).best(call)
    assert best in candidates(call) and best.inputs["squares"] == "fp32"
    (squares,) = (raw.view(np.float32) for raw in uploaded if raw.nbytes == 4 * 2 * 700 * 24)
    assert squares.min() >= 0 and squares.mean() == pytest.approx(0.01, rel=0.1)
    assert {len(arguments) for _, _, arguments in device[0].launched} <= {5, 6}  # and scratch


def test_what_is_timed_apart():
    """Rows with other sums, and without."""
    x, weight = Spec((2, 700, 768), "fp16"), Spec((3352, 768), "fp16")
    squares = [None, Spec((2, 700, 24), "fp32"), Spec((2, 700, 48), "fp32")]
    keys = {tune.Tuner(90)._key(linear.calls(x, weight, True, squares=s)[0]) for s in squares}
    assert len(keys) == len(squares)


def test_what_is_known_is_not_timed_again(device, tmp_path):
    """A second process reads the file and needs no GPU; another length is another case."""
    first = tune.Tuner(90, tmp_path / "t.json")
    best = first.best(product(700))
    again = tune.Tuner(90, tmp_path / "t.json")
    assert again.best(product(700)) == best and len(device) == 1
    again.best(product(701))
    assert len(device) == 2


def test_lengths_share_code(device):
    """Loading costs the driver's compiler a second; a length is only a parameter."""
    tuner = tune.Tuner(90)
    tuner.best(product(700))
    loaded = FakeDevice.loads
    tuner.best(product(900))
    assert FakeDevice.loads == loaded > 0


@pytest.mark.parametrize("long", [False, True], ids=["short", "long"])
def test_long_products_are_ranked_under_load(device, monkeypatch, long):
    """What is fastest for a moment may not be on a GPU that has been at work; short products do
    not heat it."""
    launches = []

    def elapsed(self, work):
        before = len(self.launched)
        work()
        count = len(self.launched) - before
        launches.append(count)
        threads = self.launched[-1][1]
        slow = {256: 1.0, 128: 1.05}.get(threads, 2.0)
        if count > 20 and threads == 256:
            slow = 1.2
        return count * slow * (1.0 if long else 0.1)

    monkeypatch.setattr(FakeDevice, "elapsed_ms", elapsed)
    monkeypatch.setattr(tune, "_FINALISTS", 20)
    best = tune.Tuner(90).best(product(700))
    assert best.tactic.num_warps == (4 if long else 8)
    assert (max(launches) >= 200) == long


def test_what_does_not_fit_is_not_tried(device):
    """sm_86 has 99 KB of shared memory a block, and four stages of 128 x 256 need twice that."""
    tuner = tune.Tuner(86)
    best = tuner.best(product(700))
    deep = next(t for t in linear.LINEAR.tactics if t.num_stages == 4 and t.num_warps == 8)
    assert str(deep) in {str(call.tactic) for call in candidates(product(700))}
    tried = {grid[0] for grid, _, _ in device[0].launched}
    assert best.tactic != deep and len(tried) < len(candidates(product(700)))


def test_other_kernels_are_left_alone(device):
    """Their time may depend on what they read, and random indices would crash them."""
    from tokred_plugins.token_split.kernel import calls

    (call, *_) = calls(Spec((1, 300), "fp32"), Spec((1,), "i32"), 150, 1)
    assert tune.Tuner(90).best(call) is call and not device


def test_a_tactic_that_is_no_more(device, tmp_path):
    """What an earlier version wrote is measured anew."""
    file = tmp_path / "t.json"
    tune.Tuner(90, file).best(product(700))
    known = json.loads(file.read_text())
    file.write_text(json.dumps(dict.fromkeys(known, "BLOCK_M=7")))
    best = tune.Tuner(90, file).best(product(700))
    assert str(best.tactic) in json.loads(file.read_text()).values()


def test_a_tactic_that_errs_is_not_taken(device, monkeypatch):
    """However fast it is."""
    monkeypatch.setattr(FakeDevice, "wrong", (FakeDevice.fastest,))
    best = tune.Tuner(90).best(product(700))
    assert best.tactic.num_warps * 32 != FakeDevice.fastest


def test_a_kernel_that_writes_nothing_is_no_engine(device, monkeypatch):
    """The call's own tactic is what others are compared with: then there is nothing to trust."""
    own = product(700).tactic.num_warps * 32
    monkeypatch.setattr(FakeDevice, "wrong", (own,))
    with pytest.raises(BuildFailed, match=r"linear with BLOCK_M=128 .*leaves its output unwritten"):
        tune.Tuner(90).best(product(700))


def test_changed_code_is_timed_anew(device, tmp_path, monkeypatch):
    """The file of an earlier version of the kernel says nothing about this one."""
    file = tmp_path / "t.json"
    tune.Tuner(90, file).best(product(700))
    monkeypatch.setattr(type(linear.linear_kernel), "cache_key", "another kernel")
    tune.Tuner(90, file).best(product(700))
    assert len(device) == 2 and len(json.loads(file.read_text())) == 2


def test_tactics_of_a_machine_with_a_newer_driver(device, tmp_path, monkeypatch):
    """A file may be shared: code that this driver cannot read is not taken from it."""
    file = tmp_path / "t.json"
    best = tune.Tuner(90, file).best(product(704))
    described = next(c for c in candidates(product(704)) if c.tactic.since >= 90)
    known = json.loads(file.read_text())
    file.write_text(json.dumps(dict.fromkeys(known, str(described.tactic))))
    assert tune.Tuner(90, file).best(product(704)) == described
    monkeypatch.setattr(FakeDevice, "cuda_version", 12060)
    found = tune.Tuner(90, file).best(product(704))
    assert found.tactic.since == 0 and found.tactic.num_warps == best.tactic.num_warps


@pytest.mark.parametrize("other", ["compiler", "GPU", "multiprocessors", "driver"])
def test_tactics_are_of_one_compiler_and_gpu(device, tmp_path, monkeypatch, other):
    """What was found right with another is found anew."""
    file = tmp_path / "t.json"
    tune.Tuner(90, file, 132).best(product(700))
    if other == "compiler":
        monkeypatch.setattr("triton.__version__", "9.9.9")
    processors = 114 if other == "multiprocessors" else 132
    driver = 13010 if other == "driver" else None
    tune.Tuner(89 if other == "GPU" else 90, file, processors, driver).best(product(700))
    assert len(device) == 2 and len(json.loads(file.read_text())) == 2


def test_programs_stay_on_the_multiprocessors_that_are_there(device):
    """As many for each as on an H100, an even number."""
    tuner = tune.Tuner(90, multiprocessors=115)
    best = tuner.best(product(704))
    assert best in candidates(product(704), 115)
    staying = {grid[0] for grid, _, _ in device[-1].launched if grid[1:] == (1, 2)}
    assert staying >= {114, 460} and not staying & {132, 528}


def test_an_old_driver_has_no_descriptors(device, monkeypatch):
    """It cannot read their PTX; the other tactics are timed as ever."""
    tried = {}
    for version in (12060, 12070):
        monkeypatch.setattr(FakeDevice, "cuda_version", version)
        tuner = tune.Tuner(90)
        tuner.best(product(704))
        tried[version] = {
            grid[0] for grid, _, _ in device[-1].launched if grid[1:] == (1, 2)
        }
    programs = {t.blocks["PROGRAMS"] for t in linear.LINEAR.tactics} - {0}
    assert tried[12070] - tried[12060] == programs and tried[12060]
