"""The page keeps to itself: what it listens on, gives out, takes in and fetches."""

import re
import socket
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from gradio_client import Client, handle_file

from mlx_sf.data.decode import load_picture
from mlx_sf.errors import MlxSfError
from mlx_sf.formats.png import save_png
from mlx_sf.web import safety
from mlx_sf.web.files import MAX_UPLOAD, Kept, uploaded_picture
from mlx_sf.web.page import Page, Place
from tests.web.conftest import QUIET

pytestmark = QUIET


@pytest.fixture
def web(page):
    with httpx.Client(base_url=page.url, trust_env=False, timeout=20) as client:
        yield client


@pytest.fixture
def kept(page) -> Path:
    save_png(page.desk.kept.folder / "mine.png", np.zeros((8, 8, 3), np.uint8), {"seed": 1})
    return page.desk.kept.folder


def test_pictures_in_the_folder_are_given_out_and_nothing_else(web, kept, place, tmp_path):
    def status(path) -> int:
        return web.get(f"/gradio_api/file={path}").status_code

    assert status(kept / "mine.png") == 200
    (tmp_path / "secret.png").write_bytes((kept / "mine.png").read_bytes())
    (kept / "notes.txt").write_text("mine")
    (kept / "link.png").symlink_to(tmp_path / "secret.png")
    (kept / "folder.png").symlink_to(tmp_path)
    (kept / "inner.png").symlink_to(kept / "notes.txt")
    run = place.runs / "tiny"
    for path in (
        "/etc/passwd", tmp_path / "secret.png", f"{kept}/../../etc/passwd", f"{kept}/..%2f..%2f..%2fetc%2fpasswd",
        kept / "notes.txt", kept / "link.png", kept / "inner.png", f"{kept}/folder.png/secret.png", kept,
        run / "config.yaml", run / "checkpoint-00000008.safetensors", "pyproject.toml", "../../../../etc/passwd",
        "http://127.0.0.1:9/x.png", "HTTPS://example.org/x.png", "file:///etc/passwd", "%00",
    ):  # fmt: skip
        assert status(path) in (403, 404), path
        assert web.get(f"/gradio_api/file/{path}").status_code in (403, 404), path
    for path in (
        "/static/../../../../etc/passwd",
        "/assets/..%2f..%2f..%2fpyproject.toml",
        "/gradio_api/proxy=http://x",
    ):
        assert web.get(path).status_code in (400, 403, 404), path
    names = [caption for _, caption in Kept(kept).gallery()]
    assert not any("link" in n or "inner" in n or "folder" in n for n in names)


def test_requests_from_elsewhere_are_refused(web, page):
    assert web.get("/", headers={"Host": "evil.example"}).status_code == 403
    assert web.get("/config", headers={"Host": f"localhost:{urlsplit(page.url).port}"}).status_code == 200
    call = {"data": [], "session_hash": "x", "fn_index": 0}
    assert web.post("/gradio_api/queue/join", json=call, headers={"Origin": "http://evil.example"}).status_code == 403
    assert web.post("/gradio_api/upload", headers={"Origin": "null"}, files={"files": b"x"}).status_code == 403


def test_nothing_is_fetched_for_a_request(web):
    file = {"path": " http://127.0.0.1:9/x.png", "meta": {"_type": "gradio.FileData"}}
    for body in ({"data": [file]}, {"data": [[{"x": file}]]}):
        assert web.post("/gradio_api/call/fill", json=body).status_code == 403
    escaped = '{"data": [{"p\\u0061th": "\\u0068ttp://127.0.0.1:9/x.png", "meta": {"_type": "gradio.FileData"}}]}'
    headers = {"Content-Type": "application/json"}
    assert web.post("/gradio_api/call/fill", content=escaped, headers=headers).status_code == 403
    assert web.post("/gradio_api/call/fill", content=b" " * (2 << 20), headers=headers).status_code == 413


def test_uploads_are_bounded_and_decoded_as_in_training(web, page, tmp_path, kept):
    big = {"files": ("big.png", b"\0" * (MAX_UPLOAD + 1), "image/png")}
    assert web.post("/gradio_api/upload", files=big).status_code == 413
    rng = np.random.default_rng(0)
    save_png(tmp_path / "wide.png", rng.integers(0, 256, (90, 200, 3)).astype(np.uint8))
    np.testing.assert_array_equal(uploaded_picture(tmp_path / "wide.png", 64), load_picture(tmp_path / "wide.png", 64))
    (tmp_path / "no.png").write_text("no picture")
    with pytest.raises(MlxSfError, match=r"no\.png: not a picture that can be read, want a picture file"):
        uploaded_picture(tmp_path / "no.png", 64)
    client = Client(page.url, verbose=False, download_files=tmp_path)
    values = [0.3, "linear", 2, 0.5, 0, 1, "house", 0, 64, 0, handle_file(tmp_path / "no.png"), ""]
    assert "no.png: not a picture" in client.predict(*values[:-1], api_name="/look")[-1]


def test_the_page_names_no_other_place(web):
    got = web.get("/")
    assert "default-src 'self'" in got.headers["content-security-policy"]
    asked = re.findall(r"""<(?:script|link|img|iframe)[^>]+(?:src|href)=["'](https?:)?//([^"'/]+)""", got.text)
    assert all(host.startswith("127.0.0.1") for _, host in asked), asked
    assert "fonts.g" not in web.get("/theme.css").text + got.text
    config = web.get("/config").json()
    assert (config["analytics_enabled"], config.get("is_space", False)) == (False, False)


def test_it_listens_on_this_machine_alone(page):
    port = urlsplit(page.url).port
    assert page.url.startswith("http://127.0.0.1:")
    with socket.create_connection(("127.0.0.1", port), timeout=5):
        pass
    with pytest.raises(OSError), socket.create_connection(("127.0.0.2", port), timeout=5):
        pass


def test_other_addresses_need_a_password():
    assert safety.check_password("127.0.0.1", None) is None
    assert safety.check_password("localhost", None) is None
    for host in ("0.0.0.0", "192.168.1.5", "::", "my-mac.local"):
        with pytest.raises(MlxSfError, match="needs a password"):
            safety.check_password(host, None)
        with pytest.raises(MlxSfError, match="has 3 characters, want at least 8"):
            safety.check_password(host, "abc")
    told = safety.exposure("0.0.0.0", Path("kept"), Path("runs"), Path("evals"))
    for word in ("kept", "runs", "evals", "draw on this machine", "not encrypted"):
        assert word in told
    check = safety.login("long enough")
    assert check("mlx-sf", "long enough")
    assert not check("mlx-sf", "long enough ")
    assert not check("root", "long enough")
    assert safety.names_of("0.0.0.0") is None
    assert safety.names_of("192.168.1.5") == {"192.168.1.5", "localhost"}


@pytest.mark.slow
def test_without_the_password_nothing_is_shown(tmp_path):
    page = Page(Place(output=tmp_path / "kept", runs=tmp_path, evals=tmp_path, password="correct horse"))
    try:
        with httpx.Client(base_url=page.start(), trust_env=False) as web:
            for path in ("/config", "/gradio_api/info", f"/gradio_api/file={tmp_path}/kept/x.png"):
                assert web.get(path).status_code == 401, path
            assert web.post("/login", data={"username": "mlx-sf", "password": "wrong"}).status_code == 400
            assert web.post("/login", data={"username": "mlx-sf", "password": "correct horse"}).status_code == 200
            assert web.get("/config").status_code == 200
    finally:
        page.close()
