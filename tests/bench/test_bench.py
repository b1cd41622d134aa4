"""What the benchmarks promise besides times: the same work on both sides, tables that add up, a figure written."""

import json

import mlx.core as mx
import numpy as np
import pytest

from mlx_sf.bench import forcing, rates, solvers, suite, t2i, tables
from mlx_sf.bench.profile import profile_step
from mlx_sf.bench.report import solver_lines
from mlx_sf.bench.sampling import measure_sampling
from mlx_sf.models.jit_sizes import model_config
from mlx_sf.models.t5 import T5Config
from mlx_sf.spectral import SpectralForcing

NANO = ["--size", "nano/8", "--img-size", "16"]


@pytest.mark.parametrize("changes", solvers.RANDOM.values(), ids=solvers.RANDOM)
def test_random_networks_depend_on_all_inputs(changes):
    model, _ = solvers.random_network(**changes)
    z = mx.random.normal((1, 3, 32, 32), key=mx.random.key(0))

    def out(z=z, t=0.3, y=1):
        return np.asarray(model(z, mx.array([t]), model.condition([y])))

    for other in (out(z=1.1 * z), out(t=0.4), out(y=2)):
        assert np.sqrt(np.mean((other - out()) ** 2)) > 1e-3 * np.abs(out()).max()


@pytest.mark.parametrize("case", ["random, v-prediction, guidance 2.9", "random, text to image, guidance 6"])
def test_solvers_converge_to_the_same_pictures(case, tmp_path):
    steps = {"euler": (8, 32), "heun": (4, 16), "multistep": (8, 32)}
    result = solvers.measure_solvers({case: solvers.CASES[case]}, images=1, steps=steps, reference=("heun", 60))
    distance = {(r["method"], r["steps"]): r["distance"] for r in result[case]}
    for method, (few, many) in steps.items():
        assert distance[method, many] < distance[method, few]
    assert distance["multistep", 32] < distance["euler", 32]
    assert len(solver_lines(result)) == 7
    solvers.plot_solvers(tmp_path / "figure.png", result)
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    json.dumps(result)


def test_text_to_image_is_measured(monkeypatch):
    result = t2i.measure_t2i("nano/8", 32, mx.float32, rounds=1, encoder=T5Config(32, 8, 40, 2, 3, 3000))
    assert result["evaluation"]["torch_fused_over_mlx"] > 0
    assert [p["evaluations"] for p in result["pictures"].values()] == [200, 50, 4]
    assert not any(p["measured"] for p in result["pictures"].values())
    first, second = tables.t2i(result)
    assert len(first.rows) == 2
    assert len(second.rows) == 3


@pytest.mark.parametrize("phase", [t2i.Phase("network", "8-bit"), t2i.Phase("adapter", batch=2)], ids=lambda p: p.task)
def test_memory_of_a_phase(phase):
    (record,) = t2i.measure_t2i_memory("nano/8", 32, phases=[phase])
    assert record["mlx_peak"] > 1e6


@pytest.mark.parametrize("kind", ["sample", "train"])
def test_parts_of_a_profile_add_up(kind):
    result = profile_step(kind, "nano/8", 16, 2, rounds=1, compile=False)
    assert set(result["parts"]) >= {"forcing", "embedder", "attention", "feed-forward", "norms and modulation", "other"}
    assert ("AdamW and two EMAs" in result["parts"]) == (kind == "train")
    assert sum(result["parts"].values()) == pytest.approx(result["seconds"])
    (table,) = tables.profile(result)
    assert [row[0] for row in table.rows] == ["whole step", *result["parts"]]


def test_sampling_is_measured_with_the_published_share_of_evaluations():
    result = measure_sampling("nano/8", 16, 2, 5, mx.float32, 2.9, rounds=1)
    assert (result["mlx_evaluations"], result["torch_evaluations"]) == (17, 18)
    assert result["torch_over_mlx"] > 0


def test_training_is_measured_with_its_peer(cli):
    arguments = ("--batch-size", 2, "--steps", 1, "--no-compile", "--json")
    status, out, _ = cli("bench", "train", *NANO, *arguments)
    result = json.loads(out)
    assert status == 0
    assert result["what"] == "training step, nano/8 at 16, batch 2, float32, eager"
    assert result["torch_over_mlx"] == result["torch_seconds"] / result["mlx_seconds"]


def test_the_forms_of_the_forcing_are_one_operator(cli, tmp_path):
    x, t = mx.random.normal((3, 3, 32, 32), key=mx.random.key(0)), mx.array([0.0, 0.4, 1.0])
    for times in (t, t[1:2]):
        want = np.asarray(SpectralForcing(32)(x, times))
        for form in (forcing.textbook(32), forcing.even_odd(32)):
            np.testing.assert_allclose(np.asarray(form(x, times)), want, atol=2e-5)
    assert forcing.operator_flops(model_config("B/32", img_size=256)) == 4 * 2 * 3 * 256**3
    arguments = ("bench", "forcing", "--size", "nano/8", "--img-size", 32, "--rounds", 1)
    status, out, _ = cli(*arguments, "--json", "--write-docs", tmp_path)
    result = json.loads(out)
    assert status == 0
    assert all(f"| {title} |" in (tmp_path / "forcing.md").read_text() for title in tables.FORMS.values())
    assert result["share_of_forward_shared"] == result["forcing_shared_seconds"] / result["forward_seconds"]
    assert "share of forward per image" in cli(*arguments)[1]


@pytest.mark.slow
def test_what_quantising_costs(cli, tmp_path):
    arguments = ("bench", "quantize", "--ckpt", "demo", *NANO)
    status, out, _ = cli(*arguments, "--rounds", 2, "--json", "--write-docs", tmp_path)
    result = json.loads(out)
    assert status == 0
    page = (tmp_path / "quantisation.md").read_text()
    assert "runs: 1 of the errors; 2 of the times, the fastest." in page
    assert "| feed forward |" in page
    rows = {row["layers"]: row for row in result["rows"]}
    assert rows["default"]["velocity_error_8"] < rows["default"]["velocity_error_4"] < rows["all"]["velocity_error_4"]
    assert result["file_bytes"]["4 bits"] < result["file_bytes"]["8 bits"] < result["file_bytes"]["bfloat16"]
    assert result["speed"]["8_bits_over_float32"] > 0
    assert "feed forward" in cli(*arguments, "--no-speed")[1]


def test_what_converting_takes(cli, tmp_path):
    status, out, _ = cli("bench", "convert", "--size", "nano/8", "--scratch", tmp_path, "--json")
    result = json.loads(out)
    assert status == 0
    # three weight sets and two moments lie in the file, one set is written; fixed positions have no moments
    assert 4.7 < result["input_bytes"] / result["output_bytes"] < 5
    assert result["peak_over_interpreter"] == result["peak_bytes"] - result["interpreter_bytes"]
    assert list(tmp_path.iterdir()) == []
    (table,) = tables.convert(result)
    assert len(table.rows[0]) == len(table.columns)


def test_features_without_a_peer_leave_its_cells_empty():
    r = {"img_size": 256, "batch_size": 2, "mlx_sf_images_per_second": 8.0, "mlx_sf_spread": "7 to 9 images/s"}
    r |= {"network_peak_bytes": 2 * 10**9, "distance_seconds": 1.5, "statistics_of_images": 50_000}
    r |= {"statistics_bytes": 148e6, "statistics_and_distance_bytes": 257e6, "statistics_seconds": 20.0}
    features, distance, memory = tables.fid(r)
    assert features.rows == (("8.0 images/s (7 to 9 images/s)", "", "", "", "", "2.00 GB"),)
    assert distance.rows == (("1.50 s", "", "", ""),)
    assert memory.rows == (("148 MB", "257 MB", "20.0 s"),)


def test_a_suite_leaves_a_record_and_tells_what_failed(tmp_path):
    parts = {
        "forward": ["forward", *NANO, "--no-peer"],
        "convert": ["convert", "--size", "unheard-of"],
    }
    records = dict(suite.run_suite(parts, tmp_path, docs=tmp_path / "docs"))
    assert suite.failures(records) == ["convert (ended with status 1)"]
    assert json.loads((tmp_path / "bench.json").read_text()) == records
    assert records["forward"]["mlx_seconds"] > 0
    assert "BLAS" in records["forward"]["machine"]["device"] or "GPU" in records["forward"]["machine"]["device"]
    assert records["forward"]["command"].startswith("mlx-sf bench forward --size nano/8")
    assert len(suite.table(records)) == 3
    assert "`mlx-sf bench forward --size nano/8" in (tmp_path / "docs" / "speed.md").read_text()


def test_a_suite_has_known_parts(refused):
    assert set(suite.chosen(None)) < set(suite.chosen("all"))
    assert list(suite.chosen("train, forward")) == ["train", "forward"]
    refused("--suite has 'everything', want some of forward, sample", "bench", "--suite", "forward,everything")


def test_rows_of_the_table():
    r = {"what": "w", "mlx_seconds": 2.0, "mlx_spread": "1 to 3 s", "torch_seconds": 3.0, "torch_spread": "3 to 3 s"}
    r |= {"torch_over_mlx": 1.5, "share_of_product_rate": 0.5, "mlx_peak_bytes": 10**9}
    fid = {"mlx_sf_images_per_second": 8.0, "mlx_sf_spread": "7 to 9 images/s", "network_peak_bytes": 2 * 10**9}
    *_, first, second = suite.table({"forward": r, "train": {"error": "no"}, "fid": fid})
    assert first == "| w | 2.00 s (1 to 3 s) | 3.00 s (3 to 3 s) | 1.50 | 50% | 1.00 GB |"
    assert second == "| FID features, 256 x 256 pictures | 8.0 images/s (7 to 9 images/s) |  |  |  | 2.00 GB |"


def test_runs_take_turns():
    order = []
    taken = rates.alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2)
    assert "".join(order) == "ababab"
    assert [len(seconds) for seconds in taken.values()] == [2, 2]
    assert rates.timing("mlx", [3.0, 1.0, 2.0]) == {"mlx_seconds": 2.0, "mlx_spread": "1 to 3 s"}
