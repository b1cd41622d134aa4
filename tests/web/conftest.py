"""A page that the tests of this folder share, on a free port, over folders of its own."""

import gc
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

import mlx_sf


def collect() -> None:
    """Event loops and sockets that Gradio leaves behind: they would be warnings, and so errors, in tests of others."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()


pytest.importorskip("gradio", reason="the page needs Gradio: pip install 'mlx-sf[app]'")
from mlx_sf.web.page import Page, Place  # noqa: E402

collect()

RUN = "tiny"
# what Gradio, pandas and the collector say meanwhile
QUIET = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="package", autouse=True)
def tidy() -> Iterator[None]:
    """Gradio's environment and litter stay in this folder."""
    before = dict(os.environ)
    yield
    collect()
    for name in set(os.environ) - set(before):
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="package")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Folders with a finished run in them."""
    root = tmp_path_factory.mktemp("page")
    mlx_sf.train(
        size="nano", patch=8, img_size=16, steps=8, batch_size=4, epoch_size=40, log_every=2, save_every=4,
        preview_every=4, preview_images=2, preview_steps=2, output=str(root / "runs"), name=RUN,
    )  # fmt: skip
    return Place(output=root / "kept", runs=root / "runs", evals=root / "evals")


@pytest.fixture(scope="package")
def page(place: Place) -> Iterator[Page]:
    page = Page(place)
    page.start()
    yield page
    page.close()
    assert not Path(page.copies).exists()
