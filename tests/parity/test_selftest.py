"""The checks that ship with the program, on this machine's devices."""

import mlx.core as mx
import pytest

from mlx_sf.parity.selftest import run


def has_gpu() -> bool:
    return mx.default_device() == mx.Device(mx.gpu)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_check_passes(dtype):
    checks = list(run(dtype))
    assert len(checks) >= 9
    for check in checks:
        assert check.passed, f"{check.name}: {check.error:.1e}, tolerance {check.tolerance:.1e}"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_check_passes_on_a_gpu(dtype):
    if not has_gpu():
        pytest.skip("MLX runs on no GPU here")
    for check in run(dtype):
        assert check.passed, f"{check.name}: {check.error:.1e}, tolerance {check.tolerance:.1e}"
