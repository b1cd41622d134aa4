"""The experiment with captions: pairs are pairs, a killed run equals one that was not, reports come from records."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time

import mlx.core as mx
import numpy as np
import pytest

from mlx_sf.data.captioned_scenes import PHRASINGS, CaptionedSceneSource, categories, held_out
from mlx_sf.errors import MlxSfError
from mlx_sf.formats.png import save_png
from scripts.captions import results, runs
from scripts.captions.data import Data, describe, pictures, prompts
from scripts.captions.experiment import Stopper, claimed, work
from scripts.captions.plan import ARMS, FEW, MICRO, PRESETS, Plan, Run, Scenes
from scripts.captions.report import marks, render, report
from scripts.captions.runs import Paused, Store, execute, initial_state, inputs, known, train
from tests.helpers import ROOT

TINY = dataclasses.replace(MICRO, patches=(8,), arms=("none", "linear"), seeds=(0,))
RUN = Run(8, "linear", 0)


def record(plan: Plan, right: float = 0.5, loss: float = 1.0, seed: int = 0) -> dict:
    """A made-up result, in which a share `right` of the pictures is."""
    rng = np.random.default_rng(seed)
    scores = {
        split: [
            {"tag": p.tag, "prompt": p.text, "correct": [int(v) for v in rng.random(plan.pictures) < right]}
            for p in prompts(plan, split)
        ]
        for split in ("seen", "unseen")
    }
    return {
        "v_loss": [loss] * plan.bins,
        "x_mse": [loss] * plan.bins,
        "spectral": loss,
        "frechet": loss,
        "scores": scores,
        "known": known(plan),
        "seconds_per_step": 0.5,
        "parameters": 1000,
    }


def untimed(r: dict) -> dict:
    return {k: v for k, v in r.items() if not k.startswith("seconds")}


# --- pairing


def test_arms_of_a_seed_start_from_the_same_weights():
    plan = MICRO
    for patch in plan.patches:
        states = [initial_state(plan.config(Run(patch, arm, 1)), 1)[1] for arm in ARMS]
        for kind in ("model", "ema1", "ema2", "m", "v"):
            for other in states[1:]:
                assert states[0][kind].keys() == other[kind].keys()
                assert all(mx.array_equal(states[0][kind][k], other[kind][k]) for k in other[kind])
    other_seed = initial_state(plan.config(Run(patch, "none", 0)), 0)[1]
    for name in ("word_table.weight", "x_embedder.proj1.weight"):
        assert not mx.array_equal(states[0]["model"][name], other_seed["model"][name])


@pytest.mark.parametrize("step", [1, 5])
def test_arms_and_patch_sizes_of_a_seed_see_the_same_batches_captions_times_and_noise(step):
    images, captions, draw = inputs(MICRO, Run(16, "none", 1), step)
    for patch in MICRO.patches:
        for arm in ARMS:
            other = inputs(MICRO, Run(patch, arm, 1), step)
            assert np.array_equal(images, other[0])
            assert captions == other[1]
            for name in ("noise", "t_normal", "drop_uniform"):
                assert mx.array_equal(getattr(draw, name), getattr(other[2], name))
    fresh = inputs(MICRO, Run(16, "none", 0), step)
    assert not np.array_equal(images, fresh[0])
    assert not mx.array_equal(draw.noise, fresh[2].noise)


def test_only_the_treatment_of_the_input_differs_between_arms():
    base, *arms = [dataclasses.asdict(MICRO.config(Run(8, arm, 0))) for arm in ARMS]
    for arm in arms:
        assert {part for part in base if arm[part] != base[part]} == {"model"}
        assert {name for name in base["model"] if arm["model"][name] != base["model"][name]} == {"forcing"}
    schedules = [c["model"]["forcing"]["scale_schedule"] for c in arms]
    assert schedules == ["linear", "fixed"]


def test_epochs_use_every_scene_once_and_differ_in_order():
    data, steps = Data(MICRO, 0), MICRO.pool // MICRO.batch_size
    epochs = [[data.batch(1 + steps * e + i) for i in range(steps)] for e in range(2)]
    keys = [[pair for batch in epoch for pair in zip(map(bytes, batch[0]), batch[1], strict=True)] for epoch in epochs]
    assert (
        sorted(keys[0]) == sorted(keys[1]) == sorted(zip(map(bytes, data.training[0]), data.training[1], strict=True))
    )
    assert keys[0] != keys[1]


# --- the scenes


def test_scenes_are_the_chosen_ones_and_no_held_out_combination_is_trained_on():
    for split in ("train", "seen", "unseen"):
        found = [describe(FEW, i, 0, split) for i in range(60)]
        for i, d in enumerate(found):
            assert d.category == categories(split)[i % len(categories(split))]
            assert {o.shape for o in d.objects} <= set(FEW.shapes)
            assert {o.colour for o in d.objects} <= set(FEW.colours)
            assert d.background in FEW.backgrounds
            assert len(held_out(d)) == (split == "unseen")
        assert {o.shape for d in found for o in d.objects} == set(FEW.shapes)
        assert {o.colour for d in found for o in d.objects} == set(FEW.colours)


def test_all_scenes_are_the_librarys_own():
    images, captions = pictures(Scenes(), 32, "unseen", 7, 9)
    source = CaptionedSceneSource((32, 32), seed=7, split="unseen")
    for i in range(9):
        picture, text = source.load(i)
        assert np.array_equal(images[i], picture)
        assert captions[i] == text


def test_captions_take_turns_through_the_phrasings_and_are_those_of_the_prompts():
    plan = dataclasses.replace(MICRO, prompts=FEW.phrasings)
    texts = [p.text for p in prompts(plan, "seen") if p.tag == "single_object"]
    ways = PHRASINGS["single_object"][: FEW.phrasings]
    assert len(texts) == len(ways)
    for text, way in zip(texts, ways, strict=True):
        assert any(text == way.format(a=f"a {shape}", one=shape) for shape in FEW.shapes)


def test_training_held_out_reference_and_prompted_scenes_are_different_scenes():
    data = Data(MICRO, 0)
    sets = [{bytes(x) for x in images} for images in (data.training[0], data.held_out[0], data.reference)]
    sets += [{bytes(p.true) for p in prompts(MICRO, split)} for split in ("seen", "unseen")]
    assert len(set.union(*sets)) == sum(map(len, sets))


def test_the_detector_finds_the_true_pictures_right_and_others_mostly_wrong():
    found = known(dataclasses.replace(MICRO, prompts=6))
    for split in ("seen", "unseen"):
        assert np.mean(list(found["true"][split].values())) > 0.97
        assert np.mean(list(found["chance"][split].values())) < 0.5


# --- runs that are killed


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The result of a run that nothing disturbed, and its samples."""
    return execute(TINY, RUN, Store(tmp_path_factory.mktemp("whole") / "run.safetensors"))


def test_a_run_that_is_stopped_and_one_that_is_killed_equal_one_that_was_not(tmp_path, monkeypatch, whole):
    store, calls = Store(tmp_path / "run.safetensors", every=0.0), []

    def soon() -> bool:
        calls.append(1)
        return len(calls) == 2

    with pytest.raises(Paused):
        train(TINY, RUN, TINY.config(RUN), store, soon)
    assert store.load(TINY, RUN)[1].step == 2

    def killed(plan, run, step):
        if step == 5:  # after the checkpoint of step 4
            raise KeyboardInterrupt
        return inputs(plan, run, step)

    monkeypatch.setattr(runs, "inputs", killed)
    with pytest.raises(KeyboardInterrupt):
        train(TINY, RUN, TINY.config(RUN), store)
    assert store.load(TINY, RUN)[1].step == 4
    monkeypatch.undo()
    got, strip = execute(TINY, RUN, store)
    assert untimed(got) == untimed(whole[0])
    assert np.array_equal(strip, whole[1])
    assert store.load(TINY, RUN)[1].step == TINY.steps  # one that was killed while it was judged is not trained again


@pytest.mark.slow
def test_a_process_that_is_killed_leaves_a_run_that_goes_on_to_the_same_result(tmp_path, whole):
    """The real thing: SIGKILL as soon as there is a checkpoint, of a run that would otherwise never end."""
    program = (
        "import sys, time, dataclasses; from pathlib import Path; import mlx_sf\n"
        "from scripts.captions import runs; from scripts.captions.runs import *\n"
        "from scripts.captions.plan import MICRO\n"
        "plain = runs.inputs\n"
        "runs.inputs = lambda plan, run, step: plain(plan, run, step) if step < 4 else time.sleep(60)\n"
        "plan, run = MICRO, Run(8, 'linear', 0)\n"
        "train(plan, run, plan.config(run), Store(Path(sys.argv[1]), 0.0))\n"
    )
    store = Store(tmp_path / "run.safetensors")
    child = subprocess.Popen([sys.executable, "-c", program, str(store.path)], cwd=ROOT)
    end = time.monotonic() + 60
    while not store.path.exists() and child.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert 1 <= store.load(TINY, RUN)[1].step <= 3
    got, strip = execute(TINY, RUN, store)
    assert untimed(got) == untimed(whole[0])
    assert np.array_equal(strip, whole[1])


def test_arms_with_one_operator_get_the_same_numbers(tmp_path, monkeypatch, whole):
    """Nothing that depends on the arm's name is left once its operator is the same: the comparison is fair."""
    config = Plan.config
    monkeypatch.setattr(Plan, "config", lambda self, run: config(self, RUN))
    other, strip = execute(TINY, Run(8, "none", 0), Store(tmp_path / "run.safetensors"))
    assert untimed(other) == untimed(whole[0])
    assert np.array_equal(strip, whole[1])


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    store = Store(tmp_path / "run.safetensors")
    with pytest.raises(Paused):
        train(TINY, RUN, TINY.config(RUN), store, lambda: True)
    for plan, run in ((dataclasses.replace(TINY, lr=0.5), RUN), (TINY, Run(8, "none", 0))):
        with pytest.raises(MlxSfError, match="run.safetensors: is the checkpoint of other settings: delete it"):
            store.load(plan, run)


def test_a_checkpoint_holds_the_state_to_the_bit(tmp_path):
    store = Store(tmp_path / "run.safetensors")
    arrays = initial_state(TINY.config(RUN), 0)[1]
    progress = runs.Progress([1 / 3, 0.1], 12.5)
    store.save(TINY, RUN, arrays, progress)
    again, at = store.load(TINY, RUN)
    assert at == progress
    assert {k: set(v) for k, v in again.items()} == {k: set(v) for k, v in arrays.items()}
    assert all(mx.array_equal(w, again[kind][k]) for kind, weights in arrays.items() for k, w in weights.items())


# --- the experiment on disk


def pretended(order: list[Run], right: dict[str, float] | None = None):
    def pretend(plan, run, store, stop):
        order.append(run)
        store.path.write_text("checkpoint")
        return record(plan, (right or {}).get(run.arm, 0.5), seed=run.seed), np.zeros((4, 4, 3), np.uint8)

    return pretend


def test_finished_runs_are_not_done_again_and_the_order_keeps_what_is_there_balanced(tmp_path):
    plan, order = MICRO, []
    for limit in (5, 2, None, None):
        work(plan, tmp_path, limit=limit, execute=pretended(order))
    assert order == list(plan.runs())
    assert len(order) == len(plan.seeds) * len(plan.patches) * len(plan.arms)
    assert [r.seed for r in order] == sorted(r.seed for r in order)
    cells = [(r.seed, r.patch) for r in order]
    assert cells == sorted(cells, key=cells.index)  # the arms of a cell stand together
    assert list(results.read(tmp_path, plan)) == order
    assert not list((tmp_path / "state").glob("*.safetensors"))


def test_a_run_that_another_process_holds_is_left_to_it(tmp_path):
    order, (first, *others) = [], list(MICRO.runs())
    (tmp_path / "state").mkdir()
    with claimed(tmp_path / "state" / f"{first.name}.lock") as mine:
        assert mine
        work(MICRO, tmp_path, execute=pretended(order))
    assert order == others


def test_work_stops_when_time_is_over_and_keeps_what_was_reached(tmp_path):
    assert work(TINY, tmp_path, Stopper(until=time.time() - 1)) == 0
    stop, asked = Stopper(), []

    def interrupted(plan, run, store, stop):
        asked.append(run)
        raise Paused

    assert work(TINY, tmp_path, stop, execute=interrupted) == 0
    assert asked == [next(iter(TINY.runs()))]
    assert results.read(tmp_path, TINY) == {}
    stop.ask(signal.SIGTERM, None)
    assert stop()
    assert Stopper(parent=os.getpid())()  # its parent is another process than itself


def test_results_of_other_settings_are_refused(tmp_path):
    results.write(tmp_path, TINY, RUN, record(TINY))
    assert list(results.read(tmp_path, dataclasses.replace(TINY, seeds=(0, 1), arms=tuple(ARMS)))) == [RUN]
    assert results.read(tmp_path, dataclasses.replace(TINY, seeds=(3,))) == {}
    for change, words in (
        ({"steps": 7}, "made with steps 6, want 7"),
        ({"scenes": dataclasses.replace(FEW, phrasings=1)}, "made with scenes .* want .*--output"),
    ):
        other = dataclasses.replace(TINY, **change)
        with pytest.raises(MlxSfError, match=f"seed0-patch8-linear.json: {words}"):
            results.read(tmp_path, other)
        with pytest.raises(MlxSfError, match=words):
            work(other, tmp_path, execute=pretended([]))


def test_damaged_records_are_named(tmp_path):
    path = results.path_of(tmp_path, RUN)
    results.write(tmp_path, TINY, RUN, record(TINY))
    good = json.loads(path.read_text())
    r = good["result"]
    for text, words in (
        ("{", "not a result"),
        ("[1]", "not a result"),
        (json.dumps({**good, "run": {**good["run"], "seed": 4}}), "holds the result of seed4-patch8-linear"),
        (json.dumps({**good, "result": {}}), "lacks numbers"),
        (json.dumps({**good, "result": {**r, "v_loss": [1.0]}}), "lacks numbers"),
        (json.dumps({**good, "result": {**r, "frechet": math.nan}}), "lacks numbers"),
        (json.dumps({**good, "result": {**r, "scores": {**r["scores"], "seen": []}}}), "lacks numbers"),
    ):
        path.write_text(text)
        with pytest.raises(MlxSfError, match=words) as e:
            results.read(tmp_path, TINY)
        assert str(path) in str(e.value)
        assert "\n" not in str(e.value)


def test_a_run_that_ends_in_nan_is_an_error_and_not_a_result(tmp_path):
    def diverged(plan, run, store, stop):
        return {**record(plan), "frechet": math.nan}, np.zeros((4, 4, 3), np.uint8)

    with pytest.raises(MlxSfError, match="seed 0, patch 8, no forcing ended with numbers that are not finite"):
        work(TINY, tmp_path, execute=diverged)
    assert results.read(tmp_path, TINY) == {}


@pytest.mark.parametrize(
    "change, words",
    [
        ({"arms": ("linear",)}, "none"),
        ({"arms": ("none", "magic")}, "magic"),
        ({"seeds": ()}, "seeds"),
        ({"patches": (4, 4)}, "patches"),
        ({"steps": 0}, "steps is 0"),
        ({"pool": 3}, "pool is 3"),
        ({"sheet": 9}, "sheet is 9"),
    ],
)
def test_plans_that_cannot_run_are_refused(change, words):
    with pytest.raises(MlxSfError, match=words):
        dataclasses.replace(MICRO, **change)


def test_scenes_that_cannot_be_are_refused():
    for values, words in (
        ({"shapes": ("circle", "blob", "star")}, "blob"),
        ({"colours": ("red",)}, "3 or more"),
        ({"phrasings": 9}, "phrasings is 9"),
        ({"shapes": ("circle", "ring", "star")}, "need backgrounds"),
        ({"backgrounds": ("night",)}, "black does not stand out from the background night"),
    ):
        with pytest.raises(MlxSfError, match=words):
            Scenes(**values)


def test_learning_rate_and_average():
    plan = dataclasses.replace(MICRO, steps=10, lr=1.0, warmup=2, cooldown=4, ema=0.9)
    assert [plan.rate(n) for n in range(1, 11)] == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])
    assert plan.decay(1) < 0.1
    assert plan.decay(10_000) == 0.9


# --- the statistics


def paired(seeds: int, ours, base, number: int = 6) -> dict[Run, dict]:
    """Records of `number` prompts a category; `ours` and `base`, (seed, prompt) -> 0 or 1, say what is right."""
    return {
        Run(8, arm, seed): {
            "scores": {
                split: [
                    {"tag": tag, "prompt": f"{tag} {i}", "correct": [right(seed, i)]}
                    for i in range(number)
                    for tag in categories(split)
                ]
                for split in ("seen", "unseen")
            }
        }
        for seed in range(seeds)
        for arm, right in (("none", base), ("linear", ours))
    }


def test_differences_are_paired_and_one_in_every_pair_has_no_width():
    found = paired(2, lambda s, i: 1, lambda s, i: 0)
    for d in results.differences(found, 8, "linear", "seen").values():
        assert (d.mean, d.low, d.high, d.per_seed, d.verdict) == (100, 100, 100, (100, 100), "higher")
    found = paired(2, lambda s, i: i % 2, lambda s, i: i % 2)  # equal, and neither all right nor wrong
    for d in results.differences(found, 8, "linear", "seen").values():
        assert (d.mean, d.low, d.high, d.verdict) == (0, 0, 0, "not shown")


def test_a_difference_on_which_seeds_disagree_or_which_has_one_seed_is_not_shown():
    found = paired(3, lambda s, i: int(s > 0), lambda s, i: int(s == 0))
    d = results.differences(found, 8, "linear", "seen")[results.OVERALL]
    assert d.low > 0
    assert d.per_seed == (-100, 100, 100)
    assert d.verdict == "not shown"
    d = results.differences(paired(1, lambda s, i: 1, lambda s, i: 0), 8, "linear", "seen")[results.OVERALL]
    assert d.verdict == "not shown"
    assert results.differences({RUN: found[RUN]}, 8, "linear", "seen") == {}  # no partner


def test_records_of_other_prompts_are_not_paired():
    found = paired(1, lambda s, i: 1, lambda s, i: 0)
    found[RUN]["scores"]["seen"][0]["prompt"] = "a unicorn"
    with pytest.raises(MlxSfError, match="unicorn"):
        results.differences(found, 8, "linear", "seen")


@pytest.mark.slow
def test_the_interval_of_a_difference_holds_the_truth_about_as_often_as_it_says():
    rng, hits = np.random.default_rng(0), []
    for _ in range(60):
        a, b = (rng.integers(2, size=(3, 20)).tolist() for _ in range(2))
        found = paired(3, lambda s, i, a=a: a[s][i], lambda s, i, b=b: b[s][i], 20)
        d = results.differences(found, 8, "linear", "seen")["counting"]
        hits.append(d.low <= 0 <= d.high)
    assert np.mean(hits) == pytest.approx(0.95, abs=0.08)


def test_gains_are_paired_by_seed_and_positive_where_an_arm_is_better():
    found = {}
    for seed, (base, ours) in enumerate([(1.0, 0.9), (2.0, 1.6), (4.0, 4.4)]):
        found[Run(8, "none", seed)], found[Run(8, "linear", seed)] = record(TINY, loss=base), record(TINY, loss=ours)
    found[Run(8, "linear", 3)] = record(TINY, loss=0.1)  # its partner is missing: no pair
    for metric in results.METRICS:
        assert results.gains(found, TINY, metric, 8, "linear") == pytest.approx([10, 20, -10])
    assert [e.mean for e in results.gain_per_time(found, 8, "linear")] == pytest.approx([20 / 3] * TINY.bins)


# --- the report


@pytest.mark.slow
def test_the_report_comes_from_records_alone(tmp_path, monkeypatch):
    plan, right = MICRO, {"none": 0.4, "linear": 0.9, "fixed": 0.1}
    for run in list(plan.runs())[:-1]:
        results.write(tmp_path, plan, run, record(plan, right[run.arm], seed=run.seed))
        strip = np.zeros((32, 32 * 10, 3), np.uint8)
        save_png(tmp_path / "samples" / f"{run.name}.png", strip)
    for name in ("train", "samples", "execute"):
        monkeypatch.setattr(runs, name, None)
    written = report("micro", plan, tmp_path, tmp_path / "README.md")
    assert [p.name for p in written] == ["scores.png", "gains.png", "times.png", "samples.png", "README.md"]
    assert all(p.read_bytes()[:4] == b"\x89PNG" and p.stat().st_size < 500_000 for p in written[:-1])
    text = written[-1].read_text()
    assert "Finished: 11 of 12 networks" in text
    assert "not finished" in text
    assert "published forcing at patch" in text
    assert "nan" not in text
    assert all(f"({p.name})" in text for p in written[:-1])
    assert text.count("\n| 16 | seen |") == 3 + 6  # arms; categories
    assert render(results.read(tmp_path, plan), plan, [p.name for p in written[:-1]], "") in text


def test_the_readme_keeps_its_other_words_and_an_empty_state_says_that_nothing_was_run(tmp_path):
    readme, (begin, end) = tmp_path / "README.md", marks("small")
    readme.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    assert report("small", PRESETS["small"], tmp_path / "small", readme) == [readme]
    text = readme.read_text()
    assert text.startswith(f"before\n{begin}\n")
    assert text.endswith(f"{end}\nafter\n")
    assert "Nothing was run yet" in text
    assert "old" not in text
    readme.write_text("no marks")
    with pytest.raises(MlxSfError, match="once each"):
        report("small", PRESETS["small"], tmp_path / "small", readme)


def test_this_projects_readme_has_a_place_for_each_preset_and_shows_what_its_records_say():
    folder = ROOT / "scripts" / "captions"
    text = (folder / "README.md").read_text()
    for preset in ("small", "simplest", "long"):
        begin, end = marks(preset)
        shown = text[text.index(begin) + len(begin) : text.index(end)].strip()
        records = results.read(folder / preset, PRESETS[preset])
        names = ("scores.png", "gains.png", "times.png", "samples.png")
        figures = [n for n in names if records and (folder / preset / n).exists()]
        assert shown == render(records, PRESETS[preset], figures, f"{preset}/").strip()


def test_the_program_says_what_is_wrong_in_one_line(tmp_path):
    results.write(tmp_path, MICRO, Run(8, "linear", 0), {})
    command = [sys.executable, "-m", "scripts.captions", "report", "--preset", "micro", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "lacks numbers" in done.stderr
