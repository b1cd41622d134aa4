"""What the benchmarks promise besides times: the same work on both sides, tables that add up, a figure written."""

import json

import mlx.core as mx
import numpy as np
import pytest

from mlx_sf.bench import forcing, rates, solvers, suite
from mlx_sf.bench.profile import profile_step
from mlx_sf.bench.sampling import measure_sampling
from mlx_sf.config import model_config
from mlx_sf.spectral import SpectralForcing


def test_random_networks_depend_on_all_inputs():
    for changes in solvers._RANDOM.values():
        model, _ = solvers.random_network(**changes)
        z = mx.random.normal((1, 3, 32, 32), key=mx.random.key(0))

        def out(z=z, t=0.3, y=1, model=model):
            return np.asarray(model(z, mx.array([t]), mx.array([y])))

        for other in (out(z=1.1 * z), out(t=0.4), out(y=2)):
            assert np.sqrt(np.mean((other - out()) ** 2)) > 1e-3 * np.abs(out()).max()


def test_solvers_converge_to_the_same_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(solvers, "REFERENCE", ("heun", 60))
    case = "random, v-prediction, guidance 2.9"
    steps = {"euler": (8, 32), "heun": (4, 16), "multistep": (8, 32)}
    result = solvers.measure_solvers([case], images=1, steps=steps)
    distance = {(r["method"], r["steps"]): r["distance"] for r in result[case]}
    for method, (few, many) in steps.items():
        assert distance[method, many] < distance[method, few]
    assert distance["multistep", 32] < distance["euler", 32]
    assert len(solvers.solver_lines(result)) == 7
    solvers.plot_solvers(tmp_path / "figure.png", result)
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    json.dumps(result)


@pytest.mark.parametrize("kind", ["sample", "train"])
def test_parts_of_a_profile_add_up(kind):
    result = profile_step(kind, "nano/8", 16, 2, rounds=1, compile=False)
    assert set(result["parts"]) >= {"forcing", "embedder", "attention", "feed-forward", "norms and modulation", "other"}
    assert ("AdamW and two EMAs" in result["parts"]) == (kind == "train")
    assert sum(result["parts"].values()) == pytest.approx(result["seconds"])


def test_sampling_is_measured_with_the_published_share_of_evaluations():
    result = measure_sampling("nano/8", 16, 2, 5, mx.float32, 2.9, rounds=1)
    assert (result["mlx_evaluations"], result["torch_evaluations"]) == (17, 18)
    assert result["torch_over_mlx"] > 0


def test_the_forms_of_the_forcing_are_one_operator(cli):
    x, t = mx.random.normal((3, 3, 32, 32), key=mx.random.key(0)), mx.array([0.0, 0.4, 1.0])
    for times in (t, t[1:2]):
        want = np.asarray(SpectralForcing(32)(x, times))
        for form in (forcing.textbook(32), forcing.even_odd(32)):
            np.testing.assert_allclose(np.asarray(form(x, times)), want, atol=2e-5)
    assert forcing.operator_flops(model_config("B/32", img_size=256)) == 4 * 2 * 3 * 256**3
    status, out, _ = cli("bench", "forcing", "--size", "nano/8", "--img-size", 32, "--rounds", 1, "--json")
    result = json.loads(out)
    assert status == 0
    assert result["share_of_forward_shared"] == result["forcing_shared_seconds"] / result["forward_seconds"]
    assert "share of forward per image" in cli("bench", "forcing", "--size", "nano/8", "--img-size", 32)[1]


def test_a_suite_leaves_a_record_and_a_table(tmp_path, cli, monkeypatch):
    small = ["--size", "nano/8", "--img-size", "16", "--no-peer"]
    monkeypatch.setitem(suite.PARTS, "forward", ["forward", *small])
    monkeypatch.setitem(suite.PARTS, "sample", ["sample", *small, "--rounds", "1"])
    monkeypatch.setitem(suite.PARTS, "convert", ["convert", "--size", "unheard-of"])
    status, out, err = cli("bench", "--suite", "forward,sample,convert", "-o", tmp_path / "b")
    assert status == 1
    assert "not measured: convert (ended with status 1)" in err
    records = json.loads((tmp_path / "b" / "bench.json").read_text())
    assert records["forward"]["mlx_seconds"] > 0
    assert "BLAS" in records["forward"]["machine"]["device"] or "GPU" in records["forward"]["machine"]["device"]
    assert records["sample"]["command"].startswith("mlx-sf bench sample --size nano/8")
    table = (tmp_path / "b" / "table.md").read_text()
    assert table in out
    assert len([line for line in table.splitlines() if line.startswith("|")]) == 4
    status, _, err = cli("bench", "--suite", "forward,everything")
    assert status == 1
    assert "--suite has 'everything', want some of forward, sample" in err


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
