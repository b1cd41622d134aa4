"""Training in two processes on this machine, under MLX's launcher."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_sf.checkpoints.checkpoint import Checkpoint, step_files
from tests.helpers import ROOT
from tests.training.runs import flags, options, run


def free_port(count: int) -> int:
    """The first of `count` ports in a row that nobody listens on."""
    for port in range(40000 + os.getpid() % 20000, 64000, count):
        try:
            for i in range(count):
                with socket.socket() as s:
                    s.bind(("127.0.0.1", port + i))
        except OSError:
            continue
        return port
    raise AssertionError("no free ports")


def launched(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    script = folder / "train.py"
    script.write_text("from mlx_sf.cli import main\nmain()\n")
    launcher = str(Path(sys.executable).with_name("mlx.launch"))
    ring = ["-n", "2", "--backend", "ring", "-p", str(free_port(8))]
    command = [launcher, *ring, "--python", sys.executable, str(script), "train", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_an_error_in_one_of_two_processes_is_one_line(tmp_path: Path) -> None:
    done = launched(tmp_path, "--lr", "-1")
    assert "--lr is -1.0, want above 0" in done.stderr
    assert "Traceback" not in done.stderr


def test_two_processes_equal_one(micro: Path, tmp_path: Path) -> None:
    done = launched(tmp_path, *flags(options(micro, tmp_path / "two", steps=2, log_every=1)))
    assert (tmp_path / "two" / "run").exists(), done.stdout + done.stderr
    assert done.stdout.count("finished: mlx-sf sample") == 1
    run(options(micro, tmp_path / "one", steps=2, log_every=1))
    one, two = (dict(step_files(tmp_path / d / "run")) for d in ("one", "two"))
    assert one.keys() == two.keys()
    a, b = (Checkpoint(c[2]).weights("model") for c in (one, two))
    assert max(mx.abs(a[k] - b[k]).max().item() for k in a) < 2e-5  # equal but for rounding
    texts = [(tmp_path / d / "run" / "metrics.jsonl").read_text() for d in ("one", "two")]
    want, got = ([json.loads(line)["loss"] for line in text.splitlines()] for text in texts)
    np.testing.assert_allclose(got, want, rtol=1e-5)
