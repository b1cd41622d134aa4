"""Freed memory stays in the process where the program is ours, and nowhere that someone decided otherwise."""

import os
import subprocess
import sys

import pytest

ASK = "from mlx_sf.device.malloc import keep_freed_memory; print(keep_freed_memory())"


def kept(**environment: str) -> bool:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))} | environment
    done = subprocess.run([sys.executable, "-c", ASK], env=env, capture_output=True, text=True, check=True)
    return done.stdout.strip() == "True"


@pytest.mark.parametrize("name, value", [("MALLOC_TRIM_THRESHOLD_", "131072"), ("MALLOC_ARENA_MAX", "4")])
def test_peoples_own_settings_stay(name, value):
    assert not kept(**{name: value})


@pytest.mark.skipif(sys.platform.startswith("linux"), reason="it acts on Linux")
def test_other_systems_are_left_alone():
    assert not kept()


def test_importing_the_package_changes_nothing():
    """The library leaves its host program's memory alone; the command line sets it for itself."""
    ask = "import sys, mlx_sf; print('mlx_sf.device.malloc' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
