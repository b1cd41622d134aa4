"""One owner for every option: typed, resolved, readable from YAML, and the defaults those of the reference."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from mlx_sf.config import Config, ModelConfig, model_config
from mlx_sf.errors import MlxSfError
from mlx_sf.settings import (
    CHANGEABLE,
    KINDS,
    Settings,
    apply_base,
    checkpoint_config,
    image_geometry,
    read_yaml,
    resolve,
    typed_options,
)
from mlx_sf.spectral import describe_forcing


def test_defaults_of_published_sizes_are_the_reference() -> None:
    s = resolve(Settings(size="B/32", batch_size=1024), steps_per_epoch=1251)
    assert s.steps == 200 * 1251
    assert s.lr == 5e-5 * 1024 / 256
    assert s.warmup_epochs == 5
    assert (s.ema_decay1, s.ema_decay2, s.ema_warmup) == (0.9999, 0.9996, False)
    assert (s.beta1, s.beta2, s.weight_decay, s.lr_schedule) == (0.9, 0.95, 0.0, "constant")
    config = checkpoint_config(s, tuple(f"c{i}" for i in range(1000)))
    assert config.model == model_config("B/32", num_classes=1000)
    assert config.name == "JiT-B/32"
    assert (config.flow.noise_scale, config.flow.label_drop_prob) == (1.0, 0.1)


def test_geometry_and_noise_follow_the_patch() -> None:
    assert image_geometry(Settings()) == (32, 256)
    assert image_geometry(Settings(patch=8)) == (8, 64)
    assert image_geometry(Settings(size="B/16")) == (16, 128)
    assert image_geometry(Settings(size="B/16", img_size=256)) == (16, 256)
    assert checkpoint_config(Settings(img_size=512), ("a",)).flow.noise_scale == 2.0
    vanilla = checkpoint_config(Settings(vanilla=True, pred_param="hybrid"), ("a",)).model
    assert (vanilla.spectral_forcing, vanilla.out_channels, vanilla.num_classes) == (False, 6, 1)


def test_resolving_twice_changes_nothing() -> None:
    s = resolve(Settings(epochs=3), 10)
    assert (s.steps, s.epochs, s.warmup_epochs) == (30, None, pytest.approx(0.3))
    assert resolve(s, 10) == s


def test_yaml(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("batch-size: 64\nlr: 1e-4\nvanilla: true\nsteps: 10\n")
    s = Settings(**read_yaml(file))
    assert (s.batch_size, s.lr, s.vanilla, s.steps) == (64, 1e-4, True, 10)


@pytest.mark.parametrize(
    "text, message",
    [
        ("learning_rate: 1", "unknown option 'learning_rate'"),
        ("batch_sise: 1", "unknown option 'batch_sise': did you mean 'batch_size'?"),
        ("- a", "holds no options"),
        ("a: [", "not valid YAML"),
        ("batch_size: many", "--batch-size is 'many', want a whole number"),
        ("batch_size: 2.5", "--batch-size is 2.5, want a whole number"),
        ("vanilla: 1", "--vanilla is 1, want true or false"),
        ("lr: true", "--lr is True, want a number"),
        ("lr: .nan", "--lr is nan, want above 0"),
        ("dtype: float8", "--dtype is 'float8', want one of float32, bfloat16, float16"),
        ("name: 3", "--name is 3, want text"),
        ("ema_decay1: 1.0", "--ema-decay1 is 1.0, want from 0 to below 1"),
    ],
)
def test_yaml_refusals(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(MlxSfError) as e:
        Settings(**read_yaml(tmp_path / "c.yaml"))
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
        s = Settings(**{"scale_schedule": "data", **given})
        assert s.schedule_cutoffs == "0.1,0.4,1.0"  # what config.yaml keeps; the file may change
        assert typed_options({"schedule_cutoffs": given["schedule_cutoffs"]}) == {"schedule_cutoffs": "0.1,0.4,1.0"}
        assert checkpoint_config(s, ("a",)).model.schedule_cutoffs == (0.1, 0.4, 1.0)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"scale_schedule": "data"}, "--schedule-cutoffs is (), want at least 2 radii with --scale-schedule data"),
        ({"schedule_cutoffs": "0.1,1"}, "--schedule-cutoffs is (0.1, 1.0), want none with --scale-schedule linear"),
        ({"scale_schedule": "data", "schedule_cutoffs": "0.5,0.1,1"}, "--schedule-cutoffs is (0.5, 0.1), want radii"),
        ({"scale_schedule": "data", "schedule_cutoffs": "0.1,nan"}, "--schedule-cutoffs is nan, want finite numbers"),
        ({"schedule_cutoffs": "no/such.txt"}, "--schedule-cutoffs no/such.txt: is no list of numbers and no readable"),
        ({"schedule_cutoffs": "words.txt"}, "--schedule-cutoffs words.txt: holds something else than numbers"),
        ({"schedule_cutoffs": "other.json"}, "--schedule-cutoffs other.json: holds something else than numbers"),
        ({"schedule_cutoffs": "1..2"}, "--schedule-cutoffs: holds something else than numbers"),
        ({"schedule_power": 2.0}, "--schedule-power is 2.0, want 1 with --scale-schedule linear"),
        ({"scale_schedule": "fixed", "exact_end": True}, "--exact-end is True, want false with --scale-schedule fixed"),
        ({"scale_schedule": "sine"}, "--scale-schedule is 'sine', want one of linear, fixed, power, cosine, data"),
    ],
)
def test_impossible_schedules_are_refused(
    given: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "words.txt").write_text("none of it")
    (tmp_path / "other.json").write_text('{"alpha": 2}')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MlxSfError) as e:
        Settings(**given)
    assert message in str(e.value)


def test_init_keeps_its_schedule_unless_another_is_named() -> None:
    base = Config().replace(scale_schedule="data", schedule_cutoffs=(0.2, 0.5, 1.0), exact_end=True)

    def model(**given: Any) -> ModelConfig:
        return checkpoint_config(Settings(**apply_base(given, base)), ("a",), base).model

    assert describe_forcing(model()) == "data 0.2,0.5,1.0, exact end"
    assert describe_forcing(model(scale_schedule="data")) == "data 0.2,0.5,1.0, exact end"
    assert describe_forcing(model(scale_schedule="linear")) == "linear, exact end"
    assert describe_forcing(model(scale_schedule="power", schedule_power=2.0, exact_end=False)) == "power 2.0"
    with pytest.raises(MlxSfError, match="--exact-end is True, want false with --scale-schedule fixed"):
        model(scale_schedule="fixed")
    with pytest.raises(MlxSfError, match="--schedule-power is 2.0, want 1 with --scale-schedule data"):
        model(schedule_power=2.0)


def test_every_option_has_help_and_a_known_kind() -> None:
    for f in dataclasses.fields(Settings):
        assert len(f.metadata["help"]) > 10
        assert f.name in KINDS
    assert set(KINDS) >= CHANGEABLE
