"""One owner for every option: typed, readable from YAML, refused by name; every open choice made once."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from mlx_sf.checkpoints.config import Config
from mlx_sf.data.sources import SceneSource
from mlx_sf.errors import MlxSfError
from mlx_sf.models.jit import JiTConfig
from mlx_sf.models.jit_sizes import model_config
from mlx_sf.spectral import ForcingConfig, describe_forcing
from mlx_sf.training.options import CHANGEABLE, KINDS, Options, read_yaml, typed_options
from mlx_sf.training.recipe import Recipe, decide, options_from


def recipe(pictures: int = 2560, base: Config | None = None, **given: Any) -> Recipe:
    o = options_from(base, given) if base else Options(**given)
    side = o.image_geometry()[1]
    return decide(o, SceneSource((side, side), pictures), base)


def test_defaults_of_published_sizes_are_the_reference() -> None:
    r = recipe(1251 * 1024, size="B/32", batch_size=1024)
    o = r.optimizer
    assert r.steps == 200 * 1251
    assert o.lr == 5e-5 * 1024 / 256
    assert o.warmup_epochs == 5
    assert (o.ema_decay1, o.ema_decay2, o.ema_warmup) == (0.9999, 0.9996, False)
    assert (o.beta1, o.beta2, o.weight_decay, o.lr_schedule) == (0.9, 0.95, 0.0, "constant")
    assert r.config.model == model_config("B/32", num_classes=10)
    assert r.config.name == "JiT-B/32"
    assert (r.config.flow.noise_scale, r.config.flow.label_drop_prob) == (1.0, 0.1)


def test_defaults_of_our_own_sizes() -> None:
    r = recipe(320, size="nano", patch=8)
    assert (r.steps, r.optimizer.lr, r.optimizer.warmup_epochs) == (500, 1e-3, 5)
    assert (r.optimizer.ema_decay1, r.optimizer.ema_decay2, r.optimizer.ema_warmup) == (0.999, 0.9999, True)
    assert recipe(320, size="nano", blr=1e-4, batch_size=64).optimizer.lr == 1e-4 * 64 / 256


def test_geometry_and_noise_follow_the_patch() -> None:
    for given, want in (
        ({}, (32, 256)),
        ({"patch": 8}, (8, 64)),
        ({"size": "B/16"}, (16, 128)),
        ({"size": "B/16", "img_size": 256}, (16, 256)),
    ):
        model = recipe(**given).config.model
        assert (model.patch_size, model.size) == (want[0], (want[1], want[1]))
    assert recipe(img_size=512).config.flow.noise_scale == 2.0
    vanilla = recipe(vanilla=True, pred_param="hybrid").config.model
    assert (vanilla.forcing, vanilla.out_channels, vanilla.num_classes) == (None, 6, 10)


def test_deciding_twice_changes_nothing() -> None:
    source = SceneSource((16, 16), 320)
    r = decide(Options(patch=2, epochs=3), source)
    assert (r.steps, r.options.epochs, r.optimizer.warmup_epochs) == (30, None, pytest.approx(0.3))
    assert decide(r.options, source) == r
    assert decide(r.options, source, stored=r.config) == r


def test_yaml(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("batch-size: 64\nlr: 1e-4\nvanilla: true\nsteps: 10\n")
    s = Options(**read_yaml(file))
    assert (s.batch_size, s.lr, s.vanilla, s.steps) == (64, 1e-4, True, 10)


@pytest.mark.parametrize(
    "text, message",
    [
        ("learning_rate: 1", "unknown option 'learning_rate'"),
        ("batch_sise: 1", "unknown option 'batch_sise': did you mean 'batch_size'?"),
        ("- a", "holds no options"),
        ("a: [", "not valid YAML"),
        ("batch_size: many", "batch_size is 'many', want a whole number"),
        ("batch_size: 2.5", "batch_size is 2.5, want a whole number"),
        ("vanilla: 1", "vanilla is 1, want true or false"),
        ("lr: true", "lr is True, want a number"),
        ("lr: .nan", "lr is nan, want above 0"),
        ("dtype: float8", "dtype is 'float8', want one of float32, bfloat16, float16"),
        ("name: 3", "name is 3, want text"),
        ("ema_decay1: 1.0", "ema_decay1 is 1.0, want from 0 to below 1"),
    ],
)
def test_yaml_refusals(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(MlxSfError) as e:
        Options(**read_yaml(tmp_path / "c.yaml"))
    assert message in str(e.value)


# ------------------------------------------------------------------------------------------------ schedules


@pytest.mark.parametrize(
    "text",
    [
        "0.1, 0.4,1",
        "0.1\n0.4\n1.0\n",
        "[0.1, 0.4, 1]",
        '{"alpha": 2.1, "schedule_cutoffs": [0.1, 0.4, 1]}',
        "0.1 0.4 1",
    ],
)
def test_cutoffs_from_a_list_or_a_file_are_the_same_option(text: str, tmp_path: Path) -> None:
    file = tmp_path / "cutoffs.txt"
    file.write_text(text)
    (tmp_path / "c.yaml").write_text("scale-schedule: data\nschedule-cutoffs: [0.1, 0.4, 1]\n")
    for given in (read_yaml(tmp_path / "c.yaml"), {"schedule_cutoffs": str(file)}, {"schedule_cutoffs": "0.1,0.4,1"}):
        s = Options(**{"scale_schedule": "data", **given})
        assert s.schedule_cutoffs == "0.1,0.4,1.0"  # what config.yaml keeps; the file may change
        assert typed_options({"schedule_cutoffs": given["schedule_cutoffs"]}) == {"schedule_cutoffs": "0.1,0.4,1.0"}
        assert s.forcing().schedule_cutoffs == (0.1, 0.4, 1.0)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"scale_schedule": "data"}, "schedule_cutoffs is (), want at least 2 radii with scale_schedule data"),
        ({"schedule_cutoffs": "0.1,1"}, "schedule_cutoffs is (0.1, 1.0), want none with scale_schedule linear"),
        ({"scale_schedule": "data", "schedule_cutoffs": "0.5,0.1,1"}, "schedule_cutoffs is (0.5, 0.1), want radii"),
        ({"scale_schedule": "data", "schedule_cutoffs": "0.1,nan"}, "schedule_cutoffs is nan, want finite numbers"),
        ({"schedule_cutoffs": "no/such.txt"}, "schedule_cutoffs no/such.txt: is no list of numbers and no readable"),
        ({"schedule_cutoffs": "words.txt"}, "schedule_cutoffs words.txt: holds something else than numbers"),
        ({"schedule_cutoffs": "other.json"}, "schedule_cutoffs other.json: holds something else than numbers"),
        ({"schedule_cutoffs": "1..2"}, "schedule_cutoffs: holds something else than numbers"),
        ({"schedule_power": 2.0}, "schedule_power is 2.0, want 1 with scale_schedule linear"),
        ({"scale_schedule": "fixed", "exact_end": True}, "exact_end is True, want false with scale_schedule fixed"),
        ({"scale_schedule": "sine"}, "scale_schedule is 'sine', want one of linear, fixed, power, cosine, data"),
    ],
)
def test_impossible_schedules_are_refused(
    given: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "words.txt").write_text("none of it")
    (tmp_path / "other.json").write_text('{"alpha": 2}')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MlxSfError) as e:
        Options(**given)
    assert message in str(e.value)


def test_a_run_from_a_checkpoint_keeps_its_schedule_unless_another_is_named() -> None:
    data = ForcingConfig(scale_schedule="data", schedule_cutoffs=(0.2, 0.5, 1.0), exact_end=True)
    base = Config(JiTConfig(forcing=data))

    def forcing(**given: Any) -> str:
        found = recipe(base=base, **given).config.model.forcing
        assert found is not None
        return describe_forcing(found)

    assert forcing() == "data 0.2,0.5,1.0, exact end"
    assert forcing(scale_schedule="data") == "data 0.2,0.5,1.0, exact end"
    assert forcing(scale_schedule="linear") == "linear, exact end"
    assert forcing(scale_schedule="power", schedule_power=2.0, exact_end=False) == "power 2.0"
    with pytest.raises(MlxSfError, match="exact_end is True, want false with scale_schedule fixed"):
        forcing(scale_schedule="fixed")
    with pytest.raises(MlxSfError, match=r"schedule_power is 2\.0, want 1 with scale_schedule data"):
        forcing(schedule_power=2.0)


def test_what_is_no_option_of_the_forcing_stays_as_in_the_checkpoint() -> None:
    base = Config(JiTConfig(forcing=ForcingConfig(mask_sharpness=12.0, min_keep=0.1, max_keep=0.9)))
    assert recipe(base=base).config.model.forcing == base.model.forcing


def test_every_option_has_help_and_a_known_kind() -> None:
    for f in dataclasses.fields(Options):
        assert len(f.metadata["help"]) > 10
        assert f.name in KINDS
    assert set(KINDS) >= CHANGEABLE
