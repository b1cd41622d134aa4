"""The controlled experiment: pairs are pairs, a killed experiment goes on as if it had not been, numbers are right."""

import dataclasses
import json
import math
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest

from mlx_sf.errors import MlxSfError
from mlx_sf.flow import FlowConfig
from scripts.regimes import results
from scripts.regimes.data import Regime, scenes, signal
from scripts.regimes.experiment import experiment, report
from scripts.regimes.features import DIMENSIONS, RandomFeatures
from scripts.regimes.plan import ARMS, PRESETS, QUICK, Plan, Run, mean_time
from scripts.regimes.runs import BANDS, BandErrors, execute, initial_state, inputs
from tests.helpers import ROOT

TINY = dataclasses.replace(QUICK, patches=(8,), regimes=("smooth",), arms=("vanilla", "linear"), steps=3, samples=8)


def record(plan: Plan, loss: float = 1.0, **more: object) -> dict:
    return {"v_loss": [loss] * plan.bins, "x_mse": [loss] * plan.bins, "spectral": loss, "frechet": loss, **more}


# --- pairing


def test_arms_of_a_seed_start_from_the_same_weights():
    plan = QUICK
    for patch in plan.patches:
        states = []
        for arm in ARMS:
            run = Run("detail", patch, arm, 1)
            states.append(initial_state(plan.config(run, Regime("detail", plan, 1).cutoffs()), run.seed)[1])
        for kind in ("model", "ema1", "m", "v"):
            for other in states[1:]:
                assert states[0][kind].keys() == other[kind].keys()
                assert all(mx.array_equal(states[0][kind][k], other[kind][k]) for k in other[kind])
    assert not mx.array_equal(
        states[0]["model"]["x_embedder.proj1.weight"],
        initial_state(plan.config(run, (0.0, 1.0)), 0)[1]["model"]["x_embedder.proj1.weight"],
    )


@pytest.mark.parametrize("step", [1, 2, 5, 9])
def test_arms_and_patch_sizes_of_a_seed_see_the_same_batches_times_and_noise(step):
    images, labels, draw = inputs(QUICK, Run("smooth", 8, "vanilla", 1), step)
    for patch in QUICK.patches:
        for arm in ARMS:
            other = inputs(QUICK, Run("smooth", patch, arm, 1), step)
            assert np.array_equal(images, other[0])
            assert np.array_equal(labels, other[1])
            for name in ("noise", "t_normal", "drop_uniform"):
                assert mx.array_equal(getattr(draw, name), getattr(other[2], name))
    fresh = inputs(QUICK, Run("smooth", 8, "vanilla", 0), step)
    assert not np.array_equal(images, fresh[0])
    assert not mx.array_equal(draw.noise, fresh[2].noise)


def test_only_the_treatment_of_the_input_differs_between_arms():
    cutoffs = Regime("smooth", QUICK, 0).cutoffs()
    base, *arms = [dataclasses.asdict(QUICK.config(Run("smooth", 8, arm, 0), cutoffs)) for arm in ARMS]
    differing = {
        name
        for arm in arms
        for name in base["model"]
        if arm["model"][name] != base["model"][name] and all(arm[p] == base[p] for p in ("flow", "sample"))
    }
    assert differing == {"forcing"}


def test_arms_with_one_operator_get_the_same_numbers(monkeypatch):
    """Nothing that depends on the arm's name is left once its operator is the same: the comparison is fair."""
    config = Plan.config
    monkeypatch.setattr(Plan, "config", lambda self, run, cutoffs: config(self, Run("smooth", 8, "linear", 0), cutoffs))
    a, b = (execute(TINY, Run("smooth", 8, arm, 0)) for arm in ("vanilla", "linear"))
    del a[0]["seconds_per_step"], b[0]["seconds_per_step"]
    assert a[0] == b[0]
    assert np.array_equal(a[1], b[1])


def test_epochs_use_every_scene_once_and_differ_in_order():
    plan = dataclasses.replace(QUICK, pool=32, batch_size=8)
    regime = Regime("smooth", plan, 0)
    epochs = [[regime.batch(1 + 4 * e + i)[0] for i in range(4)] for e in range(2)]
    keys = [[bytes(image) for batch in epoch for image in batch] for epoch in epochs]
    assert sorted(keys[0]) == sorted(keys[1]) == sorted(bytes(i) for i in regime.training[0])
    assert keys[0] != keys[1]


def test_training_held_out_and_reference_scenes_are_different_scenes():
    regime = Regime("rough", QUICK, 0)
    sets = [{bytes(i) for i in part[0]} for part in (regime.training, regime.held_out, regime.reference)]
    assert not sets[0] & sets[1]
    assert not sets[0] & sets[2]
    assert not sets[1] & sets[2]


# --- the experiment on disk


def test_an_experiment_that_was_killed_equals_one_that_was_not(tmp_path):
    plan = dataclasses.replace(TINY, seeds=(0,))
    experiment(plan, tmp_path / "whole")
    experiment(plan, tmp_path / "parts", limit=1)
    path = tmp_path / "parts" / "results.jsonl"
    with open(path, "a") as f:
        f.write('{"run": {"regime": "smo')  # killed while it wrote
    experiment(plan, tmp_path / "parts")
    found = [results.read(tmp_path / name / "results.jsonl", plan) for name in ("whole", "parts")]
    for records in found:
        assert list(records) == list(plan.runs())
        for r in records.values():
            del r["seconds_per_step"]
    assert found[0] == found[1]


def test_finished_runs_are_not_done_again_and_the_order_keeps_what_is_there_balanced(tmp_path):
    plan, order = QUICK, []

    def pretend(plan, run):
        order.append(run)
        return record(plan), np.zeros((2, 16, 16, 3), np.uint8)

    for limit in (5, 7, None, None):
        experiment(plan, tmp_path, limit=limit, execute=pretend)
    assert order == list(plan.runs())
    assert len(order) == len(plan.seeds) * len(plan.patches) * len(plan.regimes) * len(plan.arms)
    cells = [(r.seed, r.patch, r.regime) for r in order]
    assert cells == sorted(cells, key=cells.index)  # the arms of a cell stand together
    assert [r.seed for r in order] == sorted(r.seed for r in order)


def test_more_seeds_add_to_what_is_there(tmp_path):
    plan = TINY
    path = tmp_path / "results.jsonl"
    results.append(path, plan, Run("smooth", 8, "vanilla", 0), record(plan))
    more = dataclasses.replace(plan, seeds=(0, 1, 2), arms=tuple(ARMS), patches=(4, 8))
    assert list(results.read(path, more)) == [Run("smooth", 8, "vanilla", 0)]


def test_bad_lines_are_named(tmp_path):
    path, plan, run = tmp_path / "results.jsonl", TINY, Run("smooth", 8, "vanilla", 0)

    def refused(line: str, *words: str) -> None:
        path.unlink(missing_ok=True)
        results.append(path, plan, run, record(plan))
        with open(path, "a") as f:
            f.write(line + "\n")
        before = path.read_bytes()
        with pytest.raises(MlxSfError) as e:
            results.read(path, plan)
        text = str(e.value)
        assert text.count("\n") == 0
        assert "line 2" in text
        assert all(w in text for w in words), text
        assert path.read_bytes() == before

    results.append(path, plan, run, record(plan))
    whole = json.loads(path.read_text())
    refused("not json", "not a result", "delete that line")
    refused("[1, 2]", "not a result")
    refused("{}", "not a result")
    refused(json.dumps(whole), "a second result")
    other = {**whole, "settings": {**whole["settings"], "steps": 7}}
    refused(json.dumps(other), "steps 7", "want 3", "--output")
    for broken in ({}, record(plan, math.nan), {**record(plan), "v_loss": [1.0]}, {**record(plan), "frechet": "x"}):
        refused(json.dumps({**whole, "run": {**whole["run"], "seed": 5}, "result": broken}), "lacks numbers")


def test_a_run_that_ends_in_nan_is_an_error_and_not_a_result(tmp_path):
    def diverged(plan, run):
        return record(plan, math.nan), np.zeros((2, 16, 16, 3), np.uint8)

    with pytest.raises(MlxSfError, match="smooth, patch 8, vanilla, seed 0 ended with numbers that are not finite"):
        experiment(TINY, tmp_path, execute=diverged)
    assert results.read(tmp_path / "results.jsonl", TINY) == {}


@pytest.mark.parametrize(
    "change, words",
    [
        ({"regimes": ("smooth", "stripy")}, "stripy"),
        ({"arms": ("linear",)}, "vanilla"),
        ({"seeds": ()}, "seeds"),
        ({"patches": (4, 4)}, "patches"),
        ({"steps": 0}, "steps is 0"),
        ({"pool": 3}, "pool is 3"),
        ({"samples": 1}, "samples"),
    ],
)
def test_plans_that_cannot_run_are_refused(change, words):
    with pytest.raises(MlxSfError, match=words):
        dataclasses.replace(QUICK, **change)


# --- the statistics


def test_interval_of_known_numbers():
    e = results.estimate([1.0, 2.0, 3.0])
    assert (e.mean, e.n) == (2.0, 3)
    assert e.half_width == pytest.approx(4.302652729911275 / math.sqrt(3))  # t(0.975, 2), deviation 1
    assert math.isnan(results.estimate([5.0]).half_width)


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    hits = [
        abs(e.mean) <= e.half_width for e in (results.estimate(rng.standard_normal(3).tolist()) for _ in range(4000))
    ]
    assert np.mean(hits) == pytest.approx(0.95, abs=0.012)


def test_gains_are_paired_by_seed_and_positive_where_an_arm_is_better():
    plan = TINY
    records = {}
    for seed, (base, ours) in enumerate([(1.0, 0.9), (2.0, 1.6), (4.0, 4.4)]):
        records[Run("smooth", 8, "vanilla", seed)] = record(plan, base)
        records[Run("smooth", 8, "linear", seed)] = record(plan, ours)
    records[Run("smooth", 8, "linear", 3)] = record(plan, 0.1)  # its partner is missing: no pair
    for metric in results.METRICS:
        assert results.gains(records, plan, metric, "smooth", 8, "linear") == pytest.approx([10, 20, -10])
    pooled = results.overall(records, plan, "loss", "linear", "vanilla")
    assert (pooled.mean, pooled.n) == (pytest.approx(20 / 3), 3)
    assert results.overall(records, dataclasses.replace(plan, patches=(4, 8)), "loss", "linear", "vanilla") is None
    for e in results.gain_per_time(records, plan, "smooth", 8, "linear"):
        assert e.mean == pytest.approx(20 / 3)
        assert e.n == 3


def test_time_weights_are_the_share_of_training_and_their_mean_is_the_fixed_scale():
    plan, flow, rng = Plan(), FlowConfig(), np.random.default_rng(0)
    t = 1 / (1 + np.exp(-(flow.P_mean + flow.P_std * rng.standard_normal(200_000))))
    shares = np.histogram(t, bins=plan.bins, range=(0, 1))[0] / len(t)
    assert plan.weights() == pytest.approx(shares, abs=0.005)
    assert plan.weights().sum() == pytest.approx(1)
    assert mean_time(flow) == pytest.approx(t.mean(), abs=0.002)


def test_error_bands_add_up_to_the_mean_squared_error():
    x = mx.random.normal((5, 3, 16, 16), key=mx.random.key(0))
    bands = BandErrors(16)(x)
    assert bands.shape == (BANDS,)
    assert bands.sum() == pytest.approx(float(mx.square(x).mean(axis=(1, 2, 3)).sum()), rel=1e-5)


def test_wiener_baseline_lies_between_nothing_known_and_nothing_to_know():
    plan = dataclasses.replace(QUICK, pool=200, bins=50)
    b = Regime("smooth", plan, 0).baselines()
    assert np.all(np.diff(b["wiener"]) < 0)
    assert b["wiener"][0] == pytest.approx(b["mean"][0], rel=0.2)  # at t = 0.01 the state says next to nothing
    assert b["wiener"][-1] < 1e-3


def test_cutoffs_from_the_data_open_earlier_where_there_is_detail():
    plan = dataclasses.replace(Plan(), pool=300)
    smooth, detail = (np.array(Regime(name, plan, 0).cutoffs()) for name in ("smooth", "detail"))
    assert smooth[-1] == detail[-1] == 1
    assert np.all(np.diff(detail) >= 0)
    t = np.linspace(0, 1, len(detail))
    assert np.all(detail[(t > 0.68) & (t < 0.85)] > smooth[(t > 0.68) & (t < 0.85)] + 0.1)


# --- the features


def test_features_tell_regimes_apart_and_are_the_same_however_they_are_batched():
    f = RandomFeatures()
    smooth, detail = (scenes(name, 32, 2, 60)[0] for name in ("smooth", "detail"))
    a, b = f(smooth), f(detail)
    assert a.shape == (60, DIMENSIONS)
    assert np.allclose(f(smooth, chunk=7), a, atol=1e-6)
    shift = (b - a).mean(axis=0) / (b - a).std(axis=0) * math.sqrt(len(a))  # scene by scene: only the detail differs
    assert np.abs(shift).max() > 10
    assert np.array_equal(f.filters[0], RandomFeatures().filters[0])
    assert f(np.full((1, 32, 32, 3), 90, np.uint8))[0, 12:] == pytest.approx(0, abs=1e-5)  # zero-mean filters


def test_the_signal_is_on_the_scale_of_the_noise():
    assert signal(np.array([[[[0, 255, 0]]]], np.uint8)).reshape(-1).tolist() == [-1, 1, -1]


# --- the program


def test_report_makes_tables_and_figures_of_what_is_there(tmp_path):
    path, plan = tmp_path / "results.jsonl", QUICK
    rng = np.random.default_rng(0)
    for run in list(plan.runs())[:-3]:
        results.append(path, plan, run, record(plan, float(rng.uniform(1, 1.2))))
    written = report(plan, tmp_path)
    assert {p.name for p in written} == {"table.md", "table.csv", "summary.png", "times.png"}
    assert all(p.read_bytes()[:4] == b"\x89PNG" and p.stat().st_size < 300_000 for p in written if p.suffix == ".png")
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert len(lines) == 2 + len(plan.patches) * len(plan.regimes) * len(plan.arms) + 1 + 2 + len(ARMS)
    assert "nan" not in (tmp_path / "table.md").read_text() + (tmp_path / "table.csv").read_text()


def test_the_script_says_what_is_wrong_in_one_line(tmp_path):
    script = ROOT / "scripts" / "synthetic_regimes.py"
    command = [sys.executable, str(script), "--preset", "quick", "--report-only", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "no finished run" in done.stderr
    assert set(PRESETS) == {"quick", "default", "full"}
