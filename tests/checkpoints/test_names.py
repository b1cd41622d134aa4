"""How places on the Hub are written, and the table of known models."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_sf.checkpoints.known import KNOWN, at, by_name, recommended, table
from mlx_sf.checkpoints.names import HubName, parse
from mlx_sf.errors import MlxSfError
from mlx_sf.models import parameter_count
from tests.helpers import ROOT, run_cli


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("org/name", HubName("org/name")),
        ("org/name/JiT-B-16", HubName("org/name", "JiT-B-16")),
        ("org/name/a/b.pth", HubName("org/name", "a/b.pth")),
        ("org/name@2a4c86a/JiT-H-32", HubName("org/name", "JiT-H-32", "2a4c86a")),
        ("hf://org/name@v1/file.safetensors", HubName("org/name", "file.safetensors", "v1")),
        ("https://huggingface.co/org/name", HubName("org/name")),
        ("https://huggingface.co/org/name/tree/main/JiT-B-16", HubName("org/name", "JiT-B-16")),
        ("https://hub.example/org/na.me/resolve/v2/a/b.npz?download=true", HubName("org/na.me", "a/b.npz", "v2")),
    ],
)
def test_places_on_the_hub(text, want):
    assert parse(text) == want


@pytest.mark.parametrize("text", ["name", "/org/name", "org/", "org//x", "a b/c", "org/name@", "../x", "org\\name"])
def test_no_place(text):
    assert parse(text) is None


@pytest.mark.parametrize("path", ["..", "../x", "a/../../x", "a//b", "./x"])
def test_no_path_leads_out_of_a_repository(path):
    with pytest.raises(MlxSfError, match="is none inside a repository"):
        parse(f"org/name/{path}")


@given(st.text(max_size=60))
def test_any_text_is_a_place_or_none_or_refused(text):
    try:
        found = parse(text)
    except MlxSfError:
        return
    if found is not None:
        assert found.repo.count("/") == 1
        assert not found.path.startswith("/")
        assert ".." not in found.path.split("/")
        assert parse(str(found)) == found


def test_table_of_known_models_is_consistent():
    assert len({k.name for k in KNOWN}) == len(KNOWN)
    for k in KNOWN:
        assert by_name(k.name.upper()) is k
        assert at(k.repo, k.path) is k
        count = parameter_count(k.model_config())
        if k.architecture == "sensenova_u1":  # bfloat16, with the side that reads prompts and what no picture needs
            assert math.isclose(2 * (count + 8_121_323_008 + 1_244_659_712) / 1e9, k.gb, rel_tol=0.02), k.name
        else:
            assert math.isclose(4 * count / 1e9, k.gb, rel_tol=0.02), k.name  # the download is float32
        if k.architecture == "jit":
            assert k.settings["noise_scale"] == {256: 1.0, 512: 2.0}[k.image]
        else:
            assert k.settings == {}  # the converter knows them
    assert recommended("B", 16, 256)["cfg"] == 3.0
    assert recommended("B", 16, 512) == {}
    assert by_name("jit-z/16") is None


def test_models_page_holds_the_table():
    page = (ROOT / "docs" / "models.md").read_text()
    assert table() in page, "docs/models.md: put the output of `python -m mlx_sf.checkpoints.known` there"


def test_models_command(tmp_path):
    env = {"HF_HOME": str(tmp_path)}
    lines = run_cli("models", env=env)
    assert lines.returncode == 0, lines.stderr
    assert all(k.name in lines.stdout and k.repo in lines.stdout for k in KNOWN)
    facts = json.loads(run_cli("models", "--json", env=env).stdout)
    assert [m["name"] for m in facts] == [k.name for k in KNOWN]
    assert facts[0]["parameters"] == 131_320_320
    assert facts[0]["here"] == ""
