"""Classes by name: what is ambiguous or misspelt is answered with the choices, never drawn."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_sf.errors import MlxSfError
from mlx_sf.sampling.class_names import ClassNames, imagenet
from tests.helpers import GOLDEN, ROOT, run_cli

IMAGENET = ClassNames.of(1000)
SMALL = ClassNames.of(4, ("circle", "square", "7", "crane, bird"))


def refused(names: ClassNames, text: str) -> str:
    with pytest.raises(MlxSfError) as e:
        names.find(text)
    return str(e.value)


def test_table_is_imagenets():
    assert len(imagenet()) == 1000
    assert [w for w, _ in imagenet()] == sorted({w for w, _ in imagenet()})
    assert IMAGENET.assumed
    assert not ClassNames.of(1000, tuple(n for _, n in imagenet())).assumed
    assert "Princeton University" in (ROOT / "mlx_sf" / "sampling" / "imagenet1k.LICENSE.txt").read_text()


def test_every_class_is_found_by_number_id_and_whole_label():
    for i, (wnid, label) in enumerate(imagenet()):
        assert IMAGENET.find(i) == IMAGENET.find(str(i)) == IMAGENET.find(wnid) == i
        if "," in label:
            assert IMAGENET.find(label) == i


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("otter", 360), ("golden retriever", 207), ("Golden_Retriever", 207), ("golden-retriever", 207),
        ("N02099601", 207), ("tench, Tinca tinca", 0), ("Tinca tinca", 0), ("Cardigan", 264), ("cardigan", 474),
        ("partridge", 86), ("crayfish", 124), ("polecat", 358), ("gong", 577), ("harp", 594), ("missile", 657),
        ("tub", 876), ("null", None), ("None", None), (None, None), ("jack o lantern", 607),
        ("yellow ladys slipper", 986), ("maillot, tank suit", 639),
    ],
)  # fmt: skip
def test_names(text, want):
    assert IMAGENET.find(text) == want


@pytest.mark.parametrize(
    ("text", "choices"),
    [
        ("crane", (134, 517)), ("maillot", (638, 639)), ("sand viper", (54, 66)), ("grass snake", (55, 57)),
        ("crawfish", (123, 124)), ("catamount", (286, 287)), ("panther", (286, 290)), ("Sus scrofa", (341, 342)),
        ("panda", (387, 388)), ("wagon", (436, 734)), ("horn", (513, 566)), ("CARDIGAN", (264, 474)),
    ],
)  # fmt: skip
def test_ambiguous_names_are_answered_with_the_choices(text, choices):
    line = refused(IMAGENET, text)
    assert f"{text!r} is several classes, want" in line
    for i in choices:
        assert f"{i} ({imagenet()[i][0]} {imagenet()[i][1]})" in line


def test_near_misses_are_suggested_never_drawn():
    assert "did you mean 207 (n02099601 golden retriever)" in refused(IMAGENET, "golden retreiver")
    line = refused(IMAGENET, "retriever")
    assert all(f"{i} (" in line for i in (205, 206, 207, 208, 209))
    line = refused(IMAGENET, "xqzzy")
    assert line == "classes: 'xqzzy' is no class of this model, want 0 to 999, or a name such as tench, or null"
    assert "want 0 to 999" in refused(IMAGENET, "1000")
    assert "did you mean" not in refused(ClassNames.of(5), "x")


def test_own_names_win():
    assert SMALL.find("7") == 2
    assert SMALL.find("1") == 1
    assert SMALL.find("Crane") == SMALL.find("bird") == SMALL.find("crane, bird") == 3
    assert ClassNames.of(2, ("none", "some")).find("none") == 0
    assert ClassNames.of(10).find("9") == 9
    assert ClassNames.of(10).short(3) == ""
    assert IMAGENET.short(0) == "tench"


def test_split_keeps_whole_labels():
    assert IMAGENET.split("tench, Tinca tinca") == ["tench, Tinca tinca"]
    assert IMAGENET.split("tench, Tinca tinca; otter") == ["tench, Tinca tinca", "otter"]
    assert IMAGENET.split("otter\ncock\n") == ["otter", "cock"]
    assert [IMAGENET.find(p) for p in IMAGENET.split("golden retriever,otter, null,7")] == [207, 360, None, 7]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 999), st.randoms(use_true_random=False))
def test_case_and_separators_do_not_matter(i, random):
    label = imagenet()[i][1]
    text = "".join(random.choice([c.upper(), c.lower()]) for c in label)
    text = text.replace(" ", random.choice([" ", "_", "-", "  "]))
    if "," in label:
        assert IMAGENET.find(text) == i


@given(st.text(max_size=40))
def test_any_text_is_a_class_or_one_line(text):
    try:
        found = IMAGENET.find(text)
    except MlxSfError as e:
        assert "\n" not in str(e)
    else:
        assert found is None or 0 <= found < 1000


def test_classes_command(tmp_path):
    env = {"MLX_SF_CACHE": str(tmp_path)}
    demo = run_cli("classes", env=env)
    assert demo.returncode == 0, demo.stderr
    assert "house" in demo.stdout
    native = str(GOLDEN / "hub" / "native")
    found = json.loads(run_cli("classes", "--ckpt", native, "--find", "MAILLOT", "--json", env=env).stdout)
    assert [row["class"] for row in found] == [5, 6]
    crane = run_cli("sample", "--ckpt", native, "--classes", "crane", "-o", str(tmp_path / "o"), env=env)
    assert crane.returncode == 1
    assert "'crane' is several classes, want 2 (crane) or 4 (crane)" in crane.stderr
    missing = run_cli("classes", "--find", "hose", env=env)
    assert missing.returncode == 1
    assert "did you mean" in missing.stderr
