"""The golden checks of SenseNova-U1 for `selftest`: a prompt, a forward pass, guided and forced steps."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np

from ..models.u1_text import encode
from ..sampling.sampler import Sampler
from ..sampling.solvers import SampleConfig


def checks(golden: Any, dtype: str) -> Iterator[Any]:
    """Checks of a tiny network, `golden` being the numbers that scripts/make_selftest.py collected."""
    noise = golden.get("in/noise_wide")
    plain, config = golden.model("u1", dtype)
    found = encode(
        config.model,
        lambda name: golden.get(f"text/{name}").astype(mx.float32),
        lambda rows: golden.get("text/embed_tokens.weight")[mx.array(rows)],
        [golden.arrays[f"in/{branch}_ids"].tolist() for branch in ("cond", "uncond")],
        mx.float32 if dtype == "float32" else mx.bfloat16,
    )
    last = config.model.depth - 1
    yield golden.check("u1, values of a prompt", f"prefix_cond/v_{last}", found[0].values[last][None], dtype)
    forced = type(plain)(config.forced().model)
    forced.update(plain.parameters())
    for label, case, model in (
        ("u1, 4 guided steps", "wide_none", plain),
        ("u1, forced steps", "wide_none_sf", forced),
    ):
        model.features = lambda prompts: [found[0 if p is not None else 1] for p in prompts]
        flow = dataclasses.replace(config.flow, noise_scale=config.model.noise_at(noise.shape[2:]))
        sample = SampleConfig("euler", 4, 4.0, 0, 1, 0.02, 3.0, cfg_closed=True)
        *_, state = Sampler(model, flow, sample).states(noise, [""])
        yield golden.check(label, f"{case}/final", state.z, dtype)
    alone = plain(golden.get("in/fwd_image"), mx.array([0.3]), plain.condition_of(found[:1]))
    B, c, H, W = alone.shape
    P = config.model.token_size
    packed = np.asarray(alone).reshape(B, c, H // P, P, W // P, P).transpose(0, 2, 4, 3, 5, 1).reshape(B, -1, c * P * P)
    yield golden.check("u1, forward", "fwd/x_pred", mx.array(packed), dtype)
