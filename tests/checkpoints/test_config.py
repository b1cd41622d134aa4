"""What a checkpoint says about itself: round trip, defaults equal to the published ones, refusals."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_sf.checkpoints.config import Config
from mlx_sf.errors import MlxSfError
from mlx_sf.flow import FlowConfig
from mlx_sf.models.jit import JiTConfig
from mlx_sf.models.jit_sizes import find_size, model_config, preset_name
from mlx_sf.models.quantize import QuantizationConfig
from mlx_sf.sampling.solvers import SampleConfig
from mlx_sf.spectral import ForcingConfig
from tests.helpers import changed

DEFAULT = Config(JiTConfig())
FINITE = st.floats(0.01, 3, allow_nan=False)


@given(
    noise=FINITE,
    eps=st.floats(0.001, 1),
    cfg=st.floats(0, 20),
    ends=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted),
    window=st.sampled_from([0, 2, 4, 16]),
    names=st.lists(st.text(), min_size=3, max_size=3),
    provenance=st.dictionaries(st.text(), st.one_of(st.text(), st.integers(), st.none())),
)
def test_json_round_trip(noise, eps, cfg, ends, window, names, provenance):
    config = Config(
        JiTConfig(img_size=16, patch_size=4, num_classes=3, forcing=ForcingConfig(window_size=window)),
        FlowConfig(noise_scale=noise, t_eps=eps),
        SampleConfig(cfg=cfg, cfg_low=ends[0], cfg_high=ends[1]),
        "x",
        ("ema2",),
        tuple(names),
        provenance,
    )
    assert Config.from_json(config.to_json()) == config


def data(*radii):
    return {"scale_schedule": "data", "schedule_cutoffs": radii}


@pytest.mark.parametrize(
    "forcing",
    [
        {"scale_schedule": "power", "schedule_power": 0.7, "exact_end": True},
        {"scale_schedule": "cosine"},
        data(0, 0.1, 0.1, 1.2),
    ],
)
def test_schedules_travel(forcing):
    config = changed(DEFAULT, **forcing)
    again = Config.from_json(config.to_json())
    assert again == config
    assert hash(again.model) == hash(config.model)


@pytest.mark.parametrize("window", [0, 16, 256])
def test_version_1_is_read(window):
    """Files of 0.1 and 0.2, whose forcing lay among the network's fields; those of 0.1 knew no schedules."""
    model = {"img_size": 256, "window_size": window, "scale_schedule": "fixed", "fixed_scale": 0.4}
    old = {"format": "mlx-sf checkpoint", "version": 1, "model": {**model, "spectral_forcing": True}}
    config = Config.from_json(json.dumps(old))
    assert config.model.forcing == ForcingConfig(16 if window == 16 else 0, "fixed", 0.4)
    assert Config.from_json(config.to_json()) == config
    assert json.loads(config.to_json())["version"] == 2
    assert json.loads(config.to_json())["architecture"] == "jit"
    old["model"]["spectral_forcing"] = False
    assert Config.from_json(json.dumps(old)).model.forcing is None
    old["model"]["schedule_colour"] = 1
    with pytest.raises(MlxSfError, match="unknown configuration entry 'schedule_colour'"):
        Config.from_json(json.dumps(old))


def test_an_unknown_network_is_refused_by_name():
    data = json.loads(DEFAULT.to_json())
    data["architecture"] = "mmdit"
    with pytest.raises(MlxSfError, match="file.npz: architecture 'mmdit' is unknown, want one of jit"):
        Config.from_json(json.dumps(data), "file.npz")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"patch_size": 5}, "patch_size is 5, want a divisor of img_size 256"),
        ({"num_heads": 5}, "num_heads is 5, want a divisor of hidden_size 768"),
        ({"num_heads": 384}, "hidden_size / num_heads is 2, want a multiple of 4"),
        ({"depth": 0}, "depth is 0, want at least 1"),
        ({"depth": True}, "depth is True, want a whole number"),
        ({"num_classes": 0}, "num_classes is 0, want at least 1"),
        ({"in_context_start": 12}, "in_context_start is 12, want a block number from 0 to 11"),
        ({"window_size": 100}, "window_size is 100, want a divisor of img_size 256"),
        ({"fixed_scale": 1.5}, "fixed_scale is 1.5, want a scale from 0 to 1"),
        ({"scale_schedule": "sine"}, "scale_schedule is 'sine', want one of linear, fixed, power, cosine, data"),
        ({"schedule_power": 2.0}, "schedule_power is 2.0, want 1 with scale_schedule linear"),
        ({"scale_schedule": "power", "schedule_power": 0.0}, "schedule_power is 0.0, want above 0"),
        ({"scale_schedule": "power", "schedule_power": float("nan")}, "schedule_power is nan, want a finite number"),
        ({"scale_schedule": "data"}, "schedule_cutoffs is (), want at least 2 radii with scale_schedule data"),
        (data(1), "schedule_cutoffs is (1.0,), want at least 2 radii"),
        (data(0.5, 0.4, 1), "schedule_cutoffs is (0.5, 0.4), want radii that never fall"),
        (data(-0.1, 1), "schedule_cutoffs is -0.1, want a first radius of 0 or more"),
        (data(0.1, 0.9), "schedule_cutoffs is 0.9, want a last radius of at least 1"),
        (data(0.1, float("nan")), "schedule_cutoffs is nan, want finite numbers"),
        (data(0.1, float("inf")), "schedule_cutoffs is inf, want finite numbers"),
        (data(0.1, 10**400), "want finite numbers"),
        (data(0.1, True), "schedule_cutoffs is True, want finite numbers"),
        (data(0.1, "1"), "schedule_cutoffs is '1', want finite numbers"),
        ({"scale_schedule": "data", "schedule_cutoffs": "0.1,1"}, "schedule_cutoffs is '0.1,1', want a list"),
        ({"schedule_cutoffs": (0.1, 1)}, "schedule_cutoffs is (0.1, 1.0), want none with scale_schedule linear"),
        ({**data(0.1, 1), "schedule_power": 2}, "schedule_power is 2.0, want 1 with scale_schedule data"),
        ({"scale_schedule": "fixed", "exact_end": True}, "exact_end is True, want false with scale_schedule fixed"),
        ({"exact_end": True, "max_keep": 0.5}, "exact_end is True, want false unless max_keep is at least 1"),
        ({"exact_end": 1}, "exact_end is 1, want true or false"),
        ({"mask_sharpness": float("inf")}, "mask_sharpness is inf, want a finite number"),
        ({"out_channels": 4}, "out_channels is 4, want 3, or 6"),
        ({"attn_dropout": 1.0}, "attn_dropout is 1.0, want a probability below 1"),
        ({"noise_scale": 0.0}, "noise_scale is 0.0, want above 0"),
        ({"t_eps": 0.0}, "t_eps is 0.0, want above 0"),
        ({"pred_param": "eps"}, "pred_param is 'eps', want one of x, v, hybrid"),
        ({"hybrid_x_weight_min": 2.0}, "hybrid_x_weight_min is 2.0, want at most"),
        ({"steps": 0}, "steps is 0, want at least 1"),
        ({"cfg": -1.0}, "cfg is -1.0, want 0 or more"),
        ({"cfg_low": 1.0, "cfg_high": 0.0}, "cfg_interval is (1.0, 0.0), want LOW HIGH"),
        ({"class_names": ("a",)}, "class_names is '1 names', want 1000 or none"),
    ],
)
def test_impossible_values_are_refused(change, words):
    with pytest.raises(MlxSfError) as e:
        changed(DEFAULT, **change)
    assert words in str(e.value)


def test_head_and_parameterisation_belong_together():
    with pytest.raises(MlxSfError, match="out_channels is 6, want 3 with pred_param x"):
        Config(JiTConfig(out_channels=6))
    assert Config(JiTConfig(out_channels=6), FlowConfig(pred_param="hybrid")).model.out_channels == 6


def test_quantised_layers_are_the_networks_own():
    with pytest.raises(MlxSfError, match="quantization layers is 'experts', want one of attention"):
        dataclasses.replace(DEFAULT, quantization=QuantizationConfig(8, layers=("attention", "experts")))


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "not valid JSON"),
        ("[]", "not an mlx-sf checkpoint"),
        ('{"format": "other"}', "not an mlx-sf checkpoint"),
        ('{"format": "mlx-sf checkpoint", "version": 99}', "format version 99"),
        ('{"format": "mlx-sf checkpoint", "version": 1, "model": 3}', "configuration is int"),
        ('{"format": "mlx-sf checkpoint", "version": 1, "flow": {"P_std": "x"}}', "P_std is 'x', want a finite number"),
        ('{"format": "mlx-sf checkpoint", "version": 1, "weights": "ema1"}', "weights is 'ema1', want a list"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_foreign_json_is_refused(text, words):
    with pytest.raises(MlxSfError) as e:
        Config.from_json(text, "file.npz")
    assert words in str(e.value)


@given(st.text())
def test_any_text_is_read_or_refused(text):
    with pytest.raises(MlxSfError):
        Config.from_json(text)


def test_sizes_by_name():
    assert find_size("JiT-B/32") == ("B", 32)
    assert find_size("b/16") == ("B", 16)
    assert find_size("JiT-700M") == ("700M", 32)
    assert find_size("Small") == ("small", None)
    assert preset_name("B", 16) == "JiT-B/16"
    assert preset_name("2B", 32) == "JiT-2B"
    assert model_config("small", 8, 64).grid_size == 8
    for wrong in ("huge", "B/x", ""):
        with pytest.raises(MlxSfError, match="is unknown, want one of nano, tiny, small, B"):
            find_size(wrong)
