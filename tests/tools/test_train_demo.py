"""The demo's training tool: split, vocabulary, references, model, checkpoint, evaluation."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import train_demo
from demo_training import checkpoint, corpus, evaluate, ngram, train
from demo_training.model import DemoConfig, DemoModel

TINY = DemoConfig(
    vocab_size=320, d_model=32, n_layer=2, d_state=16, head_dim=16, chunk_size=8, train_chunk=8
)


@pytest.fixture(autouse=True)
def single_thread():
    """Tiny sizes run faster on one thread, and leave the machine to others."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A small made-up library: 80 modules, a test folder, and files that must not be used."""
    folder = tmp_path_factory.mktemp("python9.8")
    rng = np.random.default_rng(0)
    for number in range(80):
        name = ("test/test_" if number % 4 == 0 else "pkg/module_") + f"{number}.py"
        lines = [
            f"def function_{rng.integers(99)}(argument, other=None):\n"
            f"    return argument + {rng.integers(99)}\n\n"
            for _ in range(12)
        ]
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f'"""Module {number}."""\n\n' + "".join(lines))
    for name in ("site-packages/a.py", "pkg/__pycache__/b.py", "_sysconfigdata__x.py",
                 "pydoc_data/topics.py"):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(f"secret = '{name}'\n")
    (folder / "pkg/copy.py").write_bytes((folder / "pkg/module_1.py").read_bytes())
    (folder / "pkg/latin.py").write_bytes(b"# caf\xe9\n")
    (folder / "pkg/__init__.py").write_text("")
    return folder


def trained(folder):
    """The library's texts and a vocabulary trained on them."""
    texts = corpus.read_corpus(folder)
    return texts, corpus.train_tokenizer(texts.train, TINY.vocab_size)


def random_model():
    """A model whose every parameter is far from its initial value's symmetries."""
    torch.manual_seed(1)
    model = DemoModel(TINY).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def test_corpus_is_split_by_file_and_leaves_out_what_is_not_the_library(library):
    """Every usable file is in exactly one split; copies, other encodings and packages in none."""
    texts = corpus.read_corpus(library)
    files = [*texts.train, *texts.validation, *texts.held_out]
    assert len(files) == len(set(files)) == 80
    assert (texts.not_utf8, texts.duplicates, texts.test_files) == (1, 1, 20)
    assert not any("secret" in text for text in files)


def test_split_follows_the_path_alone():
    """The shares are as stated, and a known path stays where it was put."""
    splits = [corpus.split_of(f"package/module_{n}.py") for n in range(20000)]
    assert splits.count("held_out") / 20000 == pytest.approx(corpus.HELD_OUT_SHARE, abs=0.005)
    assert splits.count("validation") / 20000 == pytest.approx(corpus.VALIDATION_SHARE, abs=0.004)
    assert [corpus.split_of(name) for name in ("json/decoder.py", "argparse.py")] == [
        "train",
        "train",
    ]


def test_an_empty_library_is_refused(tmp_path):
    """A folder without Python files is a usage error with one sentence."""
    with pytest.raises(SystemExit, match="give its folder with --stdlib"):
        corpus.read_corpus(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "def f(x):\n\treturn x  \n\n\n        # end   \n",
        "\r\n \t mixed\r white\u00a0space \u2028 \x0b\x0c\x00\x7f",
        "".join(chr(code) for code in range(1, 0x3000)),
        "\ufeff🐍 ünï_code\U0001d518 漢字 १२३ ½²",
        "",
    ],
)
def test_any_text_survives_the_tokenizer(library, text):
    """Byte-level BPE: decoding what was encoded gives the same text, seen or not."""
    _, tokenizer = trained(library)
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_the_vocabulary_has_every_byte_and_the_end_token(library):
    """Id 0 is the end token, and text compresses to fewer tokens than bytes."""
    texts, tokenizer = trained(library)
    assert tokenizer.get_vocab_size() <= TINY.vocab_size
    assert tokenizer.token_to_id(corpus.END) == corpus.END_ID
    ids = corpus.encode(tokenizer, texts.held_out, group=2)
    assert len(ids) == len(texts.held_out)
    assert sum(map(len, ids)) < 0.5 * corpus.utf8_bytes(texts.held_out)


@pytest.mark.parametrize("seed", range(3))
def test_ngram_probabilities_sum_to_one(seed):
    """For seen, half-seen and unseen contexts alike."""
    rng = np.random.default_rng(seed)
    vocab = 11
    files = [rng.zipf(1.5, size=rng.integers(1, 80)) % (vocab - 2) for _ in range(9)]
    longest = max(range(9), key=lambda index: len(files[index]))
    model = ngram.fit(files, 4, vocab, end=0)  # token 10 never occurs
    seen = [files[longest][:3], [0, 0, 0], [0, 0, files[0][0]]]
    contexts = [*seen, [10, 10, 10], [10, 1, 2], [1, 10, 1]]
    for first, second, third in contexts:
        context_key = int((first * vocab + second) * vocab + third) * vocab
        p = ngram.probabilities(model, context_key + np.arange(vocab))
        assert p.sum() == pytest.approx(1, abs=1e-12)
        assert (p > 0).all()


def test_ngram_counts_by_hand():
    """A bigram model of one file against Kneser-Ney worked out by hand."""
    model = ngram.fit([np.array([1, 2, 1, 2, 1, 3])], 2, 4, end=0)
    # Bigrams 01 12 21 12 21 13 30: 12 and 21 twice. Types ending in 0, 1, 2, 3: 1, 2, 1, 1.
    # Too few for the estimate, so every discount is 0.75.
    unigram = (np.array([1, 2, 1, 1]) - 0.75) / 5 + 4 * 0.75 / 5 / 4
    after_1 = (np.array([0, 0, 2 - 0.75, 1 - 0.75]) + 2 * 0.75 * unigram) / 3
    found = ngram.probabilities(model, 1 * 4 + np.arange(4))
    np.testing.assert_allclose(found, after_1, rtol=1e-12)


def test_chen_goodman_discounts():
    """The estimate from counts of counts, where there are enough."""
    counts = np.repeat([1, 2, 3, 4, 9], [100, 40, 20, 10, 5])
    y = 100 / 180
    expected = [0, 1 - 2 * y * 0.4, 2 - 3 * y * 0.5, 3 - 4 * y * 0.5]
    np.testing.assert_allclose(ngram.chen_goodman_discounts(counts), expected)


def test_ngram_is_finite_on_unseen_tokens_and_learns():
    """Unseen text costs finitely many bits; repeated text costs fewer than uniform coding."""
    pattern = np.tile([5, 6, 7, 8, 9], 40)
    model = ngram.fit([pattern], 5, 4096, end=0)
    unseen = ngram.total_bits(model, [np.arange(100, 140)])
    assert 40 * 12 < unseen < math.inf
    assert ngram.total_bits(model, [pattern]) < 0.1 * 12 * len(pattern)


def test_ngram_that_cannot_be_keyed_is_refused():
    """Keys are 63-bit integers."""
    with pytest.raises(ValueError, match="63 bits"):
        ngram.fit([np.array([1])], 6, 4096, end=0)


def test_xz_reference_is_real_xz():
    """Compressing a text after a copy of itself costs almost nothing more."""
    text = "".join(str(n * n) for n in range(2000))
    alone = corpus.xz_size([text])
    assert 0.3 * len(text) < alone < len(text)
    assert corpus.xz_size([text, text]) - alone < 0.02 * alone


@pytest.mark.parametrize("length", [1, 3, 8, 37])
def test_logits_equal_transformers(length):
    """The trainable model against transformers on the same weights, at odd lengths too."""
    transformers = pytest.importorskip("transformers")
    model = random_model()
    config = transformers.Mamba2Config(**transformers_arguments())
    theirs = transformers.Mamba2ForCausalLM(config).eval()
    missing, unexpected = theirs.load_state_dict(model.state_dict(), strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    theirs.tie_weights()
    ids = torch.randint(TINY.vocab_size, (2, length), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected, found = theirs(ids, use_cache=False).logits, model(ids)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def transformers_arguments():
    """Mamba2Config's arguments for the tiny model."""
    found = dict(checkpoint.config_json(TINY))
    for name in ("architectures", "model_type", "dtype", "time_step_limit"):
        del found[name]
    return found


def test_training_chunk_does_not_change_the_result():
    """Chunks of 8 and one chunk for everything give the same logits and gradients."""
    model = random_model()
    whole = DemoModel(DemoConfig(**{**vars(TINY), "train_chunk": 64})).eval()
    whole.load_state_dict(model.state_dict())
    ids = torch.arange(50)[None]
    for each in (model, whole):
        train.loss_of(
            each.backbone(ids[:, :-1]), each.backbone.embeddings.weight, ids[:, 1:]
        ).backward()
    pairs = zip(model.named_parameters(), whole.parameters(), strict=True)
    for (name, one), other in pairs:
        assert one.grad.abs().max() > 0, name
        torch.testing.assert_close(one.grad, other.grad, atol=1e-5, rtol=1e-3)


def test_mixed_precision_stays_close():
    """The bfloat16 products that training uses on a GPU, tried on the CPU: loss and gradients."""
    model = random_model()
    ids = torch.randint(TINY.vocab_size, (2, 41), generator=torch.Generator().manual_seed(3))
    found = []
    for mixed in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            hidden = model.backbone(ids[:, :-1])
            loss = train.loss_of(hidden, model.backbone.embeddings.weight, ids[:, 1:])
        loss.backward()
        found.append((loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    (exact, gradient), (near, near_gradient) = found
    assert 0 < abs(near - exact) < 0.01 * exact
    assert torch.cosine_similarity(gradient, near_gradient, dim=0) > 0.999


def test_checkpoint_loads_in_transformers(library, tmp_path):
    """from_pretrained finds every weight, the right sizes, and the tokenizer."""
    transformers = pytest.importorskip("transformers")
    _, tokenizer = trained(library)
    model = random_model()
    checkpoint.write_texts(tmp_path, TINY, tokenizer)
    size = checkpoint.write_weights(tmp_path, model)
    assert size == (tmp_path / "model.safetensors").stat().st_size
    theirs, report = transformers.Mamba2ForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, dtype=torch.float32
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert tuple(theirs.config.time_step_limit) == (0.0, math.inf)
    written = json.loads((tmp_path / "config.json").read_text())
    theirs.config.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert written["time_step_limit"] == again["time_step_limit"] == [
        0.0, {"__float__": "Infinity"}
    ]

    ours = checkpoint.read_model(tmp_path, torch.device("cpu"))
    ids = torch.arange(40)[None]
    with torch.no_grad():
        expected = theirs.eval()(ids, use_cache=False).logits
    torch.testing.assert_close(ours(ids), expected, atol=1e-4, rtol=1e-4)
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "def f():\n    return  1\n"
    assert auto(text)["input_ids"] == tokenizer.encode(text).ids
    assert auto.decode(auto(text)["input_ids"]) == text
    assert auto.eos_token_id == auto.pad_token_id == corpus.END_ID


def test_the_demo_fits_the_package():
    """The default sizes have 6,233,120 parameters: 12.5 MB in float16."""
    count = train.parameter_count(DemoConfig())
    assert count == 6_233_120
    assert 2 * count + 20_000 < checkpoint.MAX_WEIGHT_BYTES


def test_weights_that_are_too_large_are_refused(tmp_path, monkeypatch):
    """Nothing is left under the final name."""
    monkeypatch.setattr(checkpoint, "MAX_WEIGHT_BYTES", 1000)
    with pytest.raises(SystemExit, match="at most 1000"):
        checkpoint.write_weights(tmp_path, DemoModel(TINY))
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("length", [1, 7, 8, 9, 12, 13, 100])
@pytest.mark.parametrize("stride", [1, 4, 8])
def test_windows_score_every_token_once(length, stride):
    """With the context that the stride promises."""
    scored = np.zeros(length, dtype=int)
    for start, stop, scored_from in evaluate.windows(length, 8, stride):
        scored[scored_from:stop] += 1
        assert 0 < stop - start <= 8
        assert scored_from == 0 or scored_from - start >= 8 - stride
    assert (scored == 1).all()


def test_bits_do_not_depend_on_batching_and_match_a_direct_sum():
    """Files shorter than a window: windows, padding and batches change nothing."""
    model = random_model()
    files = [np.arange(1, 20), np.array([], dtype=np.int64), np.arange(40, 100)]
    direct = 0.0
    for ids in files:
        stream = torch.tensor([0, *ids, 0])
        with torch.no_grad():
            log_p = model(stream[None, :-1])[0].log_softmax(-1)
        direct -= log_p[torch.arange(len(ids) + 1), stream[1:]].sum().item() / math.log(2)
    for batch in (64, 10_000):
        found = evaluate.total_bits(model, files, window=64, stride=32, tokens_per_batch=batch)
        assert found == pytest.approx(direct, rel=1e-5)


def test_longer_context_is_used():
    """With a stride below the window, later tokens are scored with their context."""
    model = random_model()
    ids = np.random.default_rng(0).integers(1, 300, 100)
    bits = [evaluate.total_bits(model, [ids], window=16, stride=stride) for stride in (16, 4)]
    assert bits[0] != pytest.approx(bits[1], rel=1e-4)


def test_offsets_cover_the_stream_and_stay_inside():
    """Each epoch's windows are inside the stream, at a new phase, some at a file's start."""
    starts = torch.arange(0, 1000, 40)
    generator = torch.Generator().manual_seed(0)
    batches = train.batches_of_offsets(1000, starts, 16, 4, generator)
    offsets = torch.cat([next(batches) for _ in range(200)])
    assert offsets.min() >= 0
    assert offsets.max() + 16 < 1000
    assert len(offsets.unique()) > 500
    at_start = torch.isin(offsets, starts).float().mean()
    assert train.FILE_START_SHARE * 0.7 < at_start < train.FILE_START_SHARE * 2.5


def test_joined_files_start_where_they_should():
    """Every file follows its end token, and the stream ends with one."""
    files = [np.full(n, n) for n in (3, 1, 5)]
    stream, starts = train.join_files(files, seed=0)
    assert (stream[starts] == corpus.END_ID).all()
    assert stream[-1] == corpus.END_ID
    assert sorted(stream[starts + 1]) == [1, 3, 5]
    assert len(stream) == 9 + 4


def test_learning_rate_rises_and_falls():
    """From near nothing to the peak after the warm-up and down to its last share."""
    assert 0 < train.rate_scale(0.0) < 0.05
    assert train.rate_scale(train.WARM_UP) == pytest.approx(1)
    assert train.rate_scale(1.5) == pytest.approx(train.FINAL_RATE)
    falling = [train.rate_scale(p) for p in np.linspace(train.WARM_UP, 1, 20)]
    assert falling == sorted(falling, reverse=True)


def test_training_without_a_limit_is_refused(library):
    """A run that would never end does not start."""
    texts, tokenizer = trained(library)
    ids = corpus.encode(tokenizer, texts.train)
    options = train.TrainOptions(window=32, batch_tokens=64)
    trainer = train.Trainer(TINY, ids, options, torch.device("cpu"))
    with pytest.raises(SystemExit, match="no limit"):
        train.train(trainer, lambda _: 0.0, lambda _: None, lambda _: None)


def test_the_whole_tool_on_a_small_library(library, tmp_path, capsys):
    """Trains a little, ships what it measured, and evaluates the folder to the same figure."""
    common = ["--stdlib", str(library), "--device", "cpu"]
    out = tmp_path / "demo"
    code = train_demo.main(
        ["--out", str(out), *common, "--steps", "30", "--window", "64", "--batch-tokens", "512",
         "--lr", "1e-2"],
        TINY,
    )
    written = json.loads((out / "training.json").read_text())
    assert json.loads(capsys.readouterr().out) == written
    bits = written["bits_per_byte"]
    assert set(bits) == {"model", "5-gram", "xz -9e", "xz -9e after the training text"}
    beats = bits["model"] < min(bits["xz -9e"], bits["5-gram"])
    assert (written["beats_xz_and_5gram"], code) == (beats, 0 if beats else 1)
    uniform = math.log2(TINY.vocab_size) * written["corpus"]["tokens"]["held_out"]
    assert bits["model"] < 0.7 * uniform / written["corpus"]["bytes"]["held_out"]
    assert str(tmp_path) not in (out / "training.json").read_text()
    assert str(library) not in (out / "training.json").read_text()
    assert written["corpus"]["library"] == "Python 9.80 standard library"
    assert written["training"]["steps"] == 30
    assert {path.name for path in out.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json", "training.json",
    }

    train_demo.main(["--evaluate", str(out), *common])
    again = json.loads(capsys.readouterr().out)
    assert again["bits_per_byte"] == bits
    assert again["corpus"] == written["corpus"]
