"""References by address: fetched once, checked, kept under their SHA-256, found again without a network."""

import hashlib
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import errors

from mlx_sf.errors import MlxSfError
from mlx_sf.metrics import extractor
from mlx_sf.metrics.evaluate import evaluate
from mlx_sf.metrics.reference import find_reference
from tests.metrics.fid_recipe import golden, recipe_network, recipe_weights
from tests.metrics.test_evaluate import write_pngs


def statistics(dims: int = 64) -> bytes:
    data = io.BytesIO()
    np.savez(data, mu=np.full(dims, 0.3, np.float32), sigma=0.05 * np.eye(dims))
    return data.getvalue()


STATS = statistics()
SHA = hashlib.sha256(STATS).hexdigest()


class Site(ThreadingHTTPServer):
    """A web server of a few files, which can hang up after some bytes. `asked` holds path and Range of each request."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files: dict[str, bytes] = {"/stats.npz": STATS, "/page.npz": b"<html>no such page</html>"}
        self.asked: list[tuple[str, str | None]] = []
        self.hang_up_after: int | None = None
        self.tagged = True

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"


class Answer(BaseHTTPRequestHandler):
    server: Site

    def do_GET(self) -> None:
        wanted = self.headers["Range"]
        self.server.asked.append((self.path, wanted))
        if self.path not in self.server.files:
            self.send_error(404)
            return
        data = self.server.files[self.path]
        first = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.headers["If-Range"] else 0
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(len(data) - first))
        if self.server.tagged:
            self.send_header("ETag", '"1"')
        self.end_headers()
        self.wfile.write(data[first:][: self.server.hang_up_after])

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLX_SF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def site(cache: Path) -> Iterator[Site]:
    server = Site()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_fetched_once_and_kept_under_its_checksum(site: Site, cache: Path) -> None:
    place = find_reference(site.url("/stats.npz"))
    assert (place.url, place.sha256) == (site.url("/stats.npz"), SHA)
    assert place.path == cache / "references" / SHA / "stats.npz"
    assert place.path.read_bytes() == STATS
    site.files.clear()
    assert find_reference(site.url("/stats.npz")) == place
    assert find_reference(site.url("/stats.npz#sha256=" + SHA.upper())) == place
    assert len(site.asked) == 1


def test_a_checksum_is_demanded(site: Site) -> None:
    for suffix, words in (
        ("ab" * 32, f"what is there has SHA-256 {SHA}, not abab"),
        ("ab", "ends in #sha256=ab, want"),
    ):
        with pytest.raises(MlxSfError, match=words):
            find_reference(site.url("/stats.npz#sha256=" + suffix))
    assert find_reference(site.url("/stats.npz#sha256=" + SHA)).sha256 == SHA


def test_a_damaged_copy_is_fetched_again(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    place = find_reference(site.url("/stats.npz"))
    place.path.write_bytes(STATS[:-3])
    assert find_reference(site.url("/stats.npz")) == place
    assert place.path.read_bytes() == STATS
    assert "was changed or damaged, fetching it again" in capsys.readouterr().err


def test_what_changed_at_its_address_is_not_taken_unasked(site: Site) -> None:
    place = find_reference(site.url("/stats.npz"))
    place.path.unlink()
    new = site.files["/stats.npz"] = statistics(192)
    got = hashlib.sha256(new).hexdigest()
    with pytest.raises(MlxSfError, match=f"has changed since it was first fetched .* add #sha256={got} to take"):
        find_reference(site.url("/stats.npz"))
    assert find_reference(site.url(f"/stats.npz#sha256={got}")).sha256 == got
    assert find_reference(site.url("/stats.npz")).sha256 == got


def test_a_connection_that_breaks_off_is_taken_up_again(site: Site) -> None:
    site.hang_up_after = len(STATS) // 2 + 1
    assert find_reference(site.url("/stats.npz")).sha256 == SHA
    assert [r for _, r in site.asked] == [None, f"bytes={site.hang_up_after}-"]


@pytest.mark.parametrize(
    "path, words",
    [
        ("/gone.npz", "the server answers 404 Not Found: check the address"),
        ("/page.npz", "what is there is no .npz file"),
        ("/stats.npz", "cannot be downloaded .10 of [0-9]+ bytes came.: try again"),
    ],
)
def test_what_cannot_be_had_leaves_nothing_behind(site: Site, cache: Path, path: str, words: str) -> None:
    if path == "/stats.npz":
        site.hang_up_after, site.tagged = 10, False
    with pytest.raises(MlxSfError, match=words):
        find_reference(site.url(path))
    assert not [p for p in cache.rglob("*") if p.is_file()]


def test_no_server_is_one_line(cache: Path) -> None:
    with pytest.raises(MlxSfError, match="cannot be downloaded"):
        find_reference("http://127.0.0.1:1/stats.npz")


def test_the_record_names_it(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extractor, "load_inception", lambda path: recipe_weights())
    monkeypatch.setattr(extractor, "Inception", lambda weights: recipe_network())
    samples = write_pngs(tmp_path / "few", golden("inputs.npz")["setA"][:4])
    evaluate(samples, site.url("/stats.npz"), feature_layer="64", metrics=["fid"], output=tmp_path / "out")
    record = json.loads(next((tmp_path / "out" / "records").glob("*.json")).read_text())
    assert record["reference"]["url"] == site.url("/stats.npz")
    assert record["reference"]["sha256"] == SHA


@pytest.mark.parametrize(
    "ref, kind", [("hf://a/b/c/s.npz", "model"), ("hf://datasets/a/b@v1/c/s.npz", "dataset"), ("a/b/c/s.npz", "model")]
)
def test_files_on_the_hub(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ref: str, kind: str) -> None:
    (tmp_path / "s.npz").write_bytes(STATS)
    asked = []

    def download(repo: str, path: str, **how: Any) -> str:
        asked.append((repo, path, how["repo_type"], how["revision"]))
        return str(tmp_path / "s.npz")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    for _ in range(2):
        place = find_reference(ref)
        assert (place.url, place.sha256) == (ref, SHA)
    assert asked == [("a/b", "c/s.npz", kind, "v1" if "@" in ref else "main")]


def test_what_the_hub_has_not_is_one_line(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> str:
        raise errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(MlxSfError, match="hf://a/b/s.npz: is not in the cache, and the Hub cannot be reached"):
        find_reference("hf://a/b/s.npz")
    with pytest.raises(MlxSfError, match="runs/x/s.npz is no file here, and on the Hub: is not in the cache"):
        find_reference("runs/x/s.npz")
    with pytest.raises(MlxSfError, match="hf://a/b: names no file on the Hub"):
        find_reference("hf://a/b")
