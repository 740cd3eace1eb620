"""The stage cache: made once, checked on every use, safe against kills and races."""

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tokred_export import cache as caches
from tokred_export.cache import Cache, default_limit, default_root, stage_key
from tokred_export.errors import BuildFailed, EnvironmentUnable, InvalidRequest
from tokred_export.specs import ReductionSpec

KEY = stage_key(stage="test")


class Maker:
    """A stage that writes ``size`` bytes and counts how often it ran."""

    def __init__(self, size=4):
        self.size, self.runs = size, 0

    def __call__(self, folder):
        self.runs += 1
        (folder / "sub").mkdir()
        (folder / "sub" / "data").write_bytes(b"x" * self.size)


def hidden(root, kind):
    """Temporary folders ("tmp") or marks of use ("use") below the root."""
    return sorted(path.name for path in root.glob(f".{kind}-*"))


def dead_pid():
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    return process.pid


def forget_use(root):
    """Make the marks of use look like those of a process that has ended."""
    gone = dead_pid()
    for name in hidden(root, "use"):
        (root / name).rename(root / f"{name.rpartition('-')[0]}-{gone}")


def test_made_once(tmp_path):
    """The second request for a key returns the same folder without making it again."""
    make, cache = Maker(), Cache(tmp_path / "deep" / "root")
    first = cache.get_or_make(KEY, make)
    assert cache.get_or_make(KEY, make) == first
    assert (first / "sub" / "data").read_bytes() == b"xxxx"
    assert make.runs == 1 and hidden(cache.root, "tmp") == []


def test_keys_follow_their_parts(monkeypatch):
    """Order does not matter; values, specs, source and library versions do."""
    key = stage_key(length=8, spec=ReductionSpec())
    assert key == stage_key(spec=ReductionSpec(), length=8)
    assert key != stage_key(length=9, spec=ReductionSpec())
    assert key != stage_key(length=8, spec=ReductionSpec(target=0.3))
    assert key != stage_key(length="8", spec=ReductionSpec())
    with pytest.raises(TypeError):
        stage_key(model=object())
    monkeypatch.setattr(caches, "source_digest", lambda: "other source")
    other = stage_key(length=8, spec=ReductionSpec())
    monkeypatch.setattr(caches, "library_versions", dict)
    assert len({key, other, stage_key(length=8, spec=ReductionSpec())}) == 3


def test_source_digest_covers_both_packages(monkeypatch, tmp_path):
    """Changing one source file of either package changes the digest; other files do not."""
    sources = [tmp_path / name / "a.py" for name in ("tokred_export", "tokred_plugins")]
    for path in sources:
        path.parent.mkdir()
        path.write_text("a = 1")

    def find_spec(name):
        return SimpleNamespace(submodule_search_locations=[str(tmp_path / name)])

    monkeypatch.setattr(caches, "util", SimpleNamespace(find_spec=find_spec))
    digest = caches.source_digest.__wrapped__
    seen = [digest()]
    for path in sources:
        path.write_text("a = 2")
        seen.append(digest())
    assert len(set(seen)) == 3
    (sources[0].parent / "notes.txt").write_text("a")
    assert digest() == seen[-1]


def test_corrupt_entries_are_made_again(tmp_path, caplog):
    """A changed or missing file, or a lost list, is noticed, logged, and the stage is made anew."""
    make, cache = Maker(), Cache(tmp_path)
    path = cache.get_or_make(KEY, make) / "sub" / "data"
    damages = [
        lambda: path.write_bytes(b"xxxy"),
        path.unlink,
        (tmp_path / KEY / "hashes.json").unlink,
        lambda: (tmp_path / KEY / "hashes.json").write_text("{"),
    ]
    for count, damage in enumerate(damages, start=2):
        damage()
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            cache.get_or_make(KEY, make)
        assert "is damaged" in caplog.text and KEY in caplog.text
        assert path.read_bytes() == b"xxxx" and make.runs == count
    assert hidden(tmp_path, "tmp") == []


def test_failing_stage_leaves_nothing(tmp_path):
    """An error in a stage goes through, and the next attempt starts afresh."""
    cache = Cache(tmp_path)

    def fail(folder):
        (folder / "half").write_bytes(b"half")
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        cache.get_or_make(KEY, fail)
    assert hidden(tmp_path, "tmp") == [] and not (tmp_path / KEY).exists()
    files = cache.get_or_make(KEY, Maker())
    assert [path.name for path in files.iterdir()] == ["sub"]


def test_links_are_refused(tmp_path):
    """A stage that leaves a link fails, for the link's target is not under the hash."""
    with pytest.raises(BuildFailed, match="link"):
        Cache(tmp_path).get_or_make(KEY, lambda folder: (folder / "a").symlink_to("/dev/null"))


def test_foreign_keys_are_refused(tmp_path):
    """Only keys of stage_key name entries, so that no path can be made of one."""
    with pytest.raises(ValueError, match="not a stage key"):
        Cache(tmp_path).get_or_make("../elsewhere", Maker())


def test_root_that_is_a_file(tmp_path):
    """A cache that cannot be made is the environment's fault, and says where."""
    (tmp_path / "file").write_text("mine")
    with pytest.raises(EnvironmentUnable, match="cannot write to"):
        Cache(tmp_path / "file").get_or_make(KEY, Maker())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disk(tmp_path):
    """A full disk is one clear sentence that names the cache."""

    def fail(folder):
        Path("/dev/full").write_bytes(b"x")

    with pytest.raises(EnvironmentUnable, match="disk ran full") as caught:
        Cache(tmp_path).get_or_make(KEY, fail)
    assert str(tmp_path) in str(caught.value) and hidden(tmp_path, "tmp") == []


STAGE = """
import sys
from pathlib import Path
from tokred_export.cache import Cache
def make(folder):
    (folder / "data").write_bytes(b"half")
    print("making", flush=True)
    sys.stdin.readline()
    (folder / "data").write_bytes(b"whole")
files = Cache(Path(sys.argv[1])).get_or_make(sys.argv[2], make)
print((files / "data").read_text(), flush=True)
sys.stdin.readline()
"""


def start(root):
    """Start a process that is in the middle of making KEY; each line it reads lets it go on."""
    command = [sys.executable, "-c", STAGE, str(root), KEY]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert process.stdout.readline() == "making\n"
    return process


def kill(process):
    """Kill a process the hard way and wait until it is gone."""
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_killed_stage(tmp_path):
    """A stage killed midway leaves no entry; the next run removes the rest and succeeds."""
    process = start(tmp_path)
    (half,) = hidden(tmp_path, "tmp")
    other = Cache(tmp_path).get_or_make(stage_key(stage="other"), Maker())
    assert hidden(tmp_path, "tmp") == [half]  # its maker lives
    kill(process)
    assert not (tmp_path / KEY).exists()
    Cache(tmp_path).get_or_make(KEY, Maker())
    assert hidden(tmp_path, "tmp") == [] and other.is_dir()


def test_old_temporary_folders_go(tmp_path):
    """A temporary folder of a living number is removed once it is too old to be in use."""
    old = tmp_path / f".tmp-0123abcd-{os.getppid()}"
    old.mkdir()
    os.utime(old, (time.time() - 8 * 86400,) * 2)
    new = tmp_path / f".tmp-0123abce-{os.getppid()}"
    new.mkdir()
    Cache(tmp_path).get_or_make(KEY, Maker())
    assert hidden(tmp_path, "tmp") == [new.name]


def test_two_processes_make_the_same_key(tmp_path):
    """The first to finish wins; the other one drops its work and uses the winner's."""
    process = start(tmp_path)
    mine = Cache(tmp_path).get_or_make(KEY, lambda f: (f / "data").write_text("winner"))
    assert process.communicate("\n\n") == ("winner\n", None)
    assert process.returncode == 0
    assert (mine / "data").read_text() == "winner" and hidden(tmp_path, "tmp") == []


def test_losing_against_a_damaged_entry(tmp_path):
    """If the winner's entry turns out damaged, ours takes its place."""
    cache = Cache(tmp_path)

    def make(folder):
        (folder / "data").write_text("mine")
        cache.get_or_make(KEY, Maker())  # somebody is faster
        (tmp_path / KEY / "files" / "sub" / "data").write_bytes(b"bad!")

    assert (cache.get_or_make(KEY, make) / "data").read_text() == "mine"


def test_eviction_is_by_last_use(tmp_path):
    """Above the limit the entry used longest ago goes first, and only as many as needed."""
    cache = Cache(tmp_path, limit=250)
    keys = [stage_key(number=number) for number in range(4)]
    for age, key in enumerate(keys[:3]):
        cache.get_or_make(key, Maker(size=80))
        stamp = time.time() - 1000 + age
        os.utime(tmp_path / key / "hashes.json", (stamp, stamp))
    cache.get_or_make(keys[0], Maker())  # used again: now the youngest
    forget_use(tmp_path)
    cache.get_or_make(keys[3], Maker(size=80))
    assert [(tmp_path / key).exists() for key in keys] == [True, False, True, True]


def test_entries_in_use_stay(tmp_path):
    """What a living process was handed is never evicted, nor is the entry just made."""
    holder = start(tmp_path)
    holder.stdin.write("\n")
    assert holder.stdout.readline() == "whole\n"
    try:
        big = Cache(tmp_path, limit=1).get_or_make(stage_key(stage="big"), Maker(size=100))
        assert big.is_dir() and (tmp_path / KEY).is_dir()
    finally:
        kill(holder)
    Cache(tmp_path, limit=1).get_or_make(stage_key(stage="next"), Maker())
    assert big.is_dir() and not (tmp_path / KEY).exists()


def test_foreign_folders_are_left_alone(tmp_path):
    """A root that holds other things, by mistake, loses none of them."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "hashes.json").write_text('{"a": {"bytes": 9999, "sha256": ""}}')
    (tmp_path / ".tmp-folder-of-mine").mkdir()
    Cache(tmp_path, limit=1).get_or_make(KEY, Maker())
    assert (tmp_path / "photos").is_dir() and (tmp_path / ".tmp-folder-of-mine").is_dir()


def test_defaults_come_from_the_environment(monkeypatch):
    """Root and limit follow TOKRED_CACHE, XDG_CACHE_HOME and TOKRED_CACHE_LIMIT."""
    monkeypatch.setenv("TOKRED_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert default_root() == Path("/a") == Cache().root
    monkeypatch.delenv("TOKRED_CACHE")
    assert default_root() == Path("/b/tokred-export")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_root() == Path.home() / ".cache" / "tokred-export"
    monkeypatch.delenv("TOKRED_CACHE_LIMIT", raising=False)
    assert default_limit() == 20 * 2**30
    monkeypatch.setenv("TOKRED_CACHE_LIMIT", "4k")
    assert Cache().limit == 4096
    monkeypatch.setenv("TOKRED_CACHE_LIMIT", "lots")
    with pytest.raises(InvalidRequest, match=r"TOKRED_CACHE_LIMIT: .*not a size"):
        default_limit()
