"""T5's encoder and tokenizer against the authors' numbers, in any length, padded or not."""

import json

import mlx.core as mx
import numpy as np
import pytest

from mlx_sf.checkpoints.text_encoder import TextFeatures, find_encoder
from mlx_sf.errors import MlxSfError
from mlx_sf.formats.shards import open_foreign
from mlx_sf.models.t5 import T5Config, encode, position_buckets
from mlx_sf.models.text import TextConfig
from mlx_sf.models.tokenizer import Tokenizer
from tests.minit2i import SECOND, T2I, arrays, tolerances

ROWS = json.loads((T2I / "tokenizer_cases.json").read_text())["rows"]


def run(folder, ids, mask, **how):
    """Last hidden states of padded ids, run without their padding: a list of (n, E)."""
    config = T5Config.read(folder / "config.json")
    entries = open_foreign(folder / "model.safetensors")
    table = next(n for n in ("shared.weight", "encoder.embed_tokens.weight") if n in entries)
    rows = lambda r: entries[table].array()[mx.array(r)]  # noqa: E731
    cut = [row[: int(m.sum())].tolist() for row, m in zip(ids, mask, strict=True)]
    return encode(config, lambda name: entries[name].array(), rows, cut, **how)


def near(got, want, tolerance):
    assert max(np.abs(g - w[: len(g)]).max() for g, w in zip(got, want, strict=True)) <= tolerance


@pytest.mark.parametrize("case", ["prompts", "long"])
def test_encoder(case):
    a = arrays("t5.npz")
    near(run(T2I / "t5", a[f"{case}/ids"], a[f"{case}/mask"]), a[f"{case}/out"], tolerances("t5.npz")[f"{case}/out"])


@pytest.mark.parametrize("name", "abc")
def test_encoder_second_set(name):
    """Alone, beside a decoder, with the table under its other name."""
    file = f"second/t5/{name}/golden.npz"
    a = arrays(file)
    for case in [k.removesuffix("_ids") for k in a if k.endswith("_ids")]:
        got = run(T2I / f"second/t5/{name}", a[f"{case}_ids"], a[f"{case}_mask"])
        near(got, a[f"{case}_out"], tolerances(file)[f"{case}_out"])
    buckets = position_buckets(602)
    want = [int(buckets[max(0, -d), max(0, d)]) for d in a["bucket_distance"]]
    np.testing.assert_array_equal(want, a["bucket_index"])


def test_inner_states():
    a = arrays("t5.npz")
    config = T5Config.read(T2I / "t5" / "config.json")
    assert [f"layers/hidden_{i}" in a for i in range(config.num_layers + 1)] == [True] * 4
    got = run(T2I / "t5", a["layers/ids"], np.ones_like(a["layers/ids"]))
    near(got, a["layers/hidden_3"], tolerances("t5.npz")["layers/hidden_3"])


def test_fewer_bits_cost_little():
    a = arrays("t5.npz")
    exact = run(T2I / "t5", a["long/ids"], a["long/mask"])
    spread = np.concatenate(exact).std()
    for bound, how in ((0.05, {"dtype": mx.bfloat16}), (0.05, {"bits": 8})):
        error = np.concatenate(run(T2I / "t5", a["long/ids"], a["long/mask"], **how)) - np.concatenate(exact)
        assert 0 < error.std() < bound * spread


def test_tokenizer():
    tokenizer = Tokenizer(T2I / "t5" / "tokenizer.json", 256)
    padded = arrays("t5.npz")["padded/ids"]
    for row, want in zip(ROWS, padded, strict=True):
        if row["text"] == row["text"].rstrip():  # prompts never end in white space here
            ids = tokenizer([row["text"]])[0]
            assert ids == row["ids"][: len(ids)] or len(row["ids"]) > 256
            np.testing.assert_array_equal(np.pad(ids, (0, 256 - len(ids))), want)


def test_tokenizer_second_set():
    golden = json.loads((SECOND / "tokenizer" / "golden.json").read_text())
    tokenizer = Tokenizer(SECOND / "tokenizer" / "tokenizer.json", 4096)
    texts = next(v for v in golden.values() if isinstance(v, list) and v and isinstance(v[0], dict))
    for row in texts:
        if row["text"] == row["text"].rstrip():
            assert tokenizer([row["text"]])[0] == (row.get("ids_metaspace") or row["ids_wordsplit"]), row["text"]


def test_end_to_end_features(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_SF_CACHE", str(tmp_path))
    prompts = json.loads((T2I / "e2e.json").read_text())["prompts"]
    want, mask = arrays("e2e.npz")["context"], arrays("e2e.npz")["mask"]
    first = TextFeatures(T2I / "t5", TextConfig("", 32, 256))
    near(first(prompts), want, tolerances("e2e.npz")["context"])
    assert [len(f) for f in first(prompts)] == mask.sum(axis=1).tolist()
    assert first.encoded == 3
    # a second program finds them in the cache, trailing white space or not
    second = TextFeatures(T2I / "t5", TextConfig("", 32, 256))
    for a, b in zip(first(prompts), second([p + " \n" for p in prompts]), strict=True):
        np.testing.assert_array_equal(a, b)
    assert second.encoded == 0
    # another precision, another number of places: other features
    assert TextFeatures(T2I / "t5", TextConfig("", 32, 256), "8-bit")(prompts)[0].shape == (len(first(prompts)[0]), 32)
    assert len(TextFeatures(T2I / "t5", TextConfig("", 32, 5))(prompts)[0]) == 5


def test_a_cache_that_was_cut_short(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_SF_CACHE", str(tmp_path))
    features = TextFeatures(T2I / "t5", TextConfig("", 32, 256))
    want = features(["one", "two"])
    folder = next((tmp_path / "text").iterdir())
    for file, kept in (("index.jsonl", -5), ("features.f32", -7)):
        data = (folder / file).read_bytes()
        (folder / file).write_bytes(data[:kept])
    again = TextFeatures(T2I / "t5", TextConfig("", 32, 256))
    for a, b in zip(again(["one", "two", "three"]), want, strict=False):
        np.testing.assert_allclose(a, b, atol=1e-6)
    third = TextFeatures(T2I / "t5", TextConfig("", 32, 256))
    np.testing.assert_array_equal(third(["two"])[0], again(["two"])[0])


def test_too_many_words(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_SF_CACHE", str(tmp_path))
    for _ in range(2):  # computed, then found
        features = TextFeatures(T2I / "t5", TextConfig("", 32, 256))
        assert len(features(["word " * 10_000])[0]) == 256
        assert "40001 tokens, the model reads the first 255" in features.notes()[0]
    assert TextFeatures(T2I / "t5", TextConfig("", 32, 256)).notes() == []


def test_encoders_that_are_none(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_SF_CACHE", str(tmp_path / "cache"))
    with pytest.raises(MlxSfError, match=r"gives 32 numbers a token, this network reads 1024: name the encoder"):
        TextFeatures(T2I / "t5", TextConfig("google/flan-t5-large", 1024, 256))(["a"])
    with pytest.raises(MlxSfError, match="no such folder, want one with config.json"):
        find_encoder("./nowhere")
    (tmp_path / "x").mkdir()
    with pytest.raises(MlxSfError, match=r"lacks config.json, tokenizer.json, .safetensors"):
        find_encoder(tmp_path / "x")
    for text, message in (
        ('{"model_type": "clip"}', "describes 'clip', want a T5 encoder"),
        ('{"model_type": "t5", "feed_forward_proj": "relu"}', "want T5 of version 1.1"),
        ("[]", "describes 'list'"),
        ("{", "not valid JSON"),
    ):
        (tmp_path / "x" / "config.json").write_text(text)
        with pytest.raises(MlxSfError, match=message):
            T5Config.read(tmp_path / "x" / "config.json")
    (tmp_path / "x" / "tokenizer.json").write_text("{}")
    with pytest.raises(MlxSfError, match="cannot be read as a tokenizer"):
        Tokenizer(tmp_path / "x" / "tokenizer.json", 8)
