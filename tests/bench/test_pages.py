"""Pages of results: written from records alone, dated, with the machine, the command and the runs."""

import datetime
import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest

import mlx_sf
from mlx_sf.bench import tables
from mlx_sf.bench.pages import MEASUREMENTS, PAGES, rendered, write_pages
from mlx_sf.bench.records import Record, keep, kept, new_record, read, save
from tests.helpers import ROOT

RESULTS = ROOT / "docs" / "results"


def test_committed_pages_are_what_the_committed_records_say():
    pages = rendered(kept(RESULTS))
    assert set(pages) == set(PAGES)
    assert {path.stem for path in RESULTS.glob("*.md")} == {*PAGES, "notes"}
    for name, text in pages.items():
        assert (RESULTS / f"{name}.md").read_text() == text, f"{name}.md: write it anew with --write-docs"
    for record in kept(RESULTS):
        assert not record.figure or (RESULTS / record.figure).is_file()


def test_a_command_writes_its_page(cli, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    arguments = ("bench", "forward", "--size", "nano/8", "--img-size", 16, "--batch-size", 1, "--no-peer")
    status, out, _ = cli(*arguments, "--json", "--write-docs", tmp_path)
    assert status == 0
    (record,) = kept(tmp_path)
    assert record.result == {k: v for k, v in json.loads(out).items() if k != "machine"}
    command = "OMP_NUM_THREADS=1 mlx-sf bench forward --size nano/8 --img-size 16 --batch-size 1 --no-peer"
    assert record.command == command
    assert (record.version, record.date) == (mlx_sf.__version__, datetime.date.today().isoformat())
    text = (tmp_path / "speed.md").read_text()
    for part in (f"`{command}`", record.date, "threads: 1 thread", "product rate: ", "MLX: ", "runs: 7 by turns"):
        assert part in text
    assert record.result["what"] in text
    assert str(ROOT) not in text + json.dumps(dict(record.machine))
    assert [path.name for path in tmp_path.glob("*.md")] == ["speed.md"]
    other = tmp_path / "other"
    assert cli("bench", "--write-docs", other, *arguments[1:])[0] == 0  # the flag works on either side
    assert [r.command for r in kept(other)] == [command]


def test_a_figure_is_drawn_beside_its_page(tmp_path):
    from mlx_sf.bench.pages import publish

    points = [{"method": m, "steps": n, "evaluations": n, "distance": 1 / n} for m in ("euler", "heun") for n in (4, 8)]
    points += [{"method": "multistep", "steps": 4, "evaluations": 4, "distance": 0.1}]
    publish(tmp_path, new_record("solvers", "mlx-sf bench solvers", "1", {"a case": points, "another": points}))
    text = (tmp_path / "solvers.md").read_text()
    assert "| heun | 4: 0.2500, 8: 0.1250 |" in text
    (record,) = kept(tmp_path)
    assert f"]({record.figure})" in text
    assert (tmp_path / record.figure).read_bytes().startswith(b"\x89PNG")


def test_the_newest_version_comes_first_and_measuring_again_replaces(tmp_path):
    first = Record("convert", "convert", "0.9.0", "2030-01-01", {"threads": "2"}, "c", "1", {"tables": []})
    for record in (first, replace(first, version="0.10.0"), replace(first, version="0.10.0", date="2030-02-02")):
        keep(tmp_path, record)
    write_pages(tmp_path)
    lines = [line for line in (tmp_path / "speed.md").read_text().splitlines() if line.startswith("**Version")]
    assert lines == ["**Version 0.10.0**, measured 2030-02-02: `c`", "**Version 0.9.0**, measured 2030-01-01: `c`"]


def test_every_kind_of_measurement_has_a_page():
    assert {kind.page for kind in MEASUREMENTS.values()} == set(PAGES)


def test_memory_cells_as_a_table():
    cell = {"task": "train", "size": "B/32", "img_size": 256, "batch": 8, "dtype": "float32", "bits": None}
    cell |= {"grad_checkpoint": True, "weights": 10**9, "state": 2e9, "mlx_peak": 3e9, "process_peak": 4e9}
    failed = {**cell, "grad_checkpoint": False, "error": "out of memory"}
    (table,) = tables.memory({"cells": [cell, failed]})
    assert table.rows[0] == ("B/32 at 256", "8", "float32, checkpointing", "1.00", "2.00", "3.00", "4.00")
    assert table.rows[1][3] == "not measured"


def test_a_run_of_the_tests_leaves_the_parity_page(tmp_path, cli):
    path = tmp_path / "parity.json"
    environment = {**os.environ, "MLX_SF_PARITY_RECORD": str(path)}
    chosen = ["tests/test_spectral.py", "-k", "golden", "-p", "no:cacheprovider"]
    subprocess.run([sys.executable, "-m", "pytest", *chosen], cwd=ROOT, env=environment, check=True)
    groups = {g["group"]: g for g in read(path).result["groups"]}
    assert groups["operator.npz"]["comparisons"] > 0
    assert 0 < groups["operator.npz"]["largest"] <= 1
    status, out, _ = cli("bench", "parity", path, "--write-docs", tmp_path / "docs")
    assert status == 0
    assert "operator: transforms, masks, filters" in out
    page = (tmp_path / "docs" / "parity.md").read_text()
    assert out in page
    assert cli("bench", "--write-docs", tmp_path / "other", "parity", path)[0] == 0  # the flag works on either side
    assert (tmp_path / "other" / "parity.md").read_text() == page


def test_what_is_no_record_is_refused(tmp_path, refused):
    path = tmp_path / "r.json"
    path.write_text('{"groups": []}')
    refused("is no record of a measurement", "bench", "parity", path)
    save(path, new_record("convert", "mlx-sf bench convert", "1", {}))
    refused("want one of the parity", "bench", "parity", path)


@pytest.mark.parametrize("name", PAGES)
def test_pages_say_nothing_of_where_they_were_written(name):
    text = (RESULTS / f"{name}.md").read_text()
    assert not re.findall(r"(?:^|[\s`(])/\w+/", text)
