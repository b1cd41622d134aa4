"""The memory table: figures from processes of their own that are what they say."""

import json

import pytest

from mlx_sf.bench.memory import Cell, measure_memory

NANO = {"size": "nano/8", "img_size": 16}


@pytest.fixture(scope="module")
def records() -> list[dict]:
    cells = [
        Cell("sample", batch=1, **NANO),
        Cell("sample", batch=1, bits=4, **NANO),
        Cell("sample", batch=1, dtype="bfloat16", **NANO),
        Cell("train", batch=4, **NANO),
        Cell("sample", batch=1, dtype="int8", **NANO),
    ]
    return list(measure_memory(cells))


def test_figures_add_up(records):
    plain, quantised, half, train, _ = records
    for r in (plain, quantised, half, train):
        assert r["weights"] <= r["mlx_peak"] < r["process_peak"], r["what"]
    # 91 % of the products' weights in 4.5 bits, all of them in 16
    assert quantised["weights"] < 0.4 * plain["weights"]
    assert 0.5 * plain["weights"] <= half["weights"] < 0.65 * plain["weights"]
    assert half["loading"] < plain["loading"]
    # weights, two averages, two moments; and gradients on top
    assert train["state"] >= 2 * train["weights"]
    assert train["mlx_peak"] >= 5 * train["weights"]


def test_a_cell_that_fails_says_why_and_the_others_go_on(records):
    assert "dtype 'int8' is unknown" in records[-1]["error"]


def test_command(cli, refused):
    arguments = ("--task", "train", "--size", "nano/8", "--img-size", 16, "--train-batch-size", 2)
    status, out, _ = cli("bench", "memory", *arguments, "--json")
    assert status == 0
    assert [c["grad_checkpoint"] for c in json.loads(out)["cells"]] == [False, True]
    refused("batch sizes '1,x'", "bench", "memory", "--batch-size", "1,x")
    refused("size 'huge' is unknown", "bench", "memory", "--size", "huge")
