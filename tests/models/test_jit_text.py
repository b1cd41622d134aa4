"""JiT conditioned on captions: what enters where, precomputed or not, guided, quantised, adapted."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_sf.errors import FieldError
from mlx_sf.flow import FlowConfig, training_loss
from mlx_sf.models import Step, architecture, build, parameter_shapes
from mlx_sf.models.jit_text import ARCHITECTURE, JiTTextConfig, model_config
from mlx_sf.models.text import TextConfig
from mlx_sf.sampling.sampler import Sampler
from mlx_sf.sampling.solvers import SampleConfig

WORDS = TextConfig("", 12, 5, ("a", "blue", "red", "star"))
PROMPTS = ["a red star", None, "", "a blue star"]


def network(text=WORDS, **changes):
    """A small network in which every parameter acts."""
    model = build(model_config("nano", 8, 16, depth=2, in_context_start=1, text=text, **changes), mx.random.key(1))
    leaves = tree_flatten(model.parameters())
    keys = mx.random.split(mx.random.key(2), len(leaves))
    model.load_weights(
        [(n, w + 0.2 * mx.random.normal(w.shape, key=k)) for (n, w), k in zip(leaves, keys, strict=True)]
    )
    return model


def inputs(batch=4):
    return mx.random.normal((batch, 3, 16, 16), key=mx.random.key(3)), mx.array([0.3])


def test_every_caption_has_its_own_picture():
    model, (z, t) = network(), inputs()
    z = mx.broadcast_to(z[:1], z.shape)
    out = np.asarray(model(z, t, model.condition(PROMPTS)))
    for i in range(4):
        for j in range(i):
            # "" has no words: it is what stands where there is no prompt
            same = {i, j} == {1, 2}
            assert np.allclose(out[i], out[j], atol=1e-5) == same, (i, j)
    # the time enters without forcing, too
    later = np.asarray(model(z, mx.array([0.6]), model.condition(PROMPTS)))
    assert np.abs(later - out).max() > 1e-2


@pytest.mark.parametrize("forced", [False, True])
def test_what_a_sampler_computes_beforehand_changes_nothing(forced):
    model, (z, t) = network(**({} if forced else {"forcing": None})), inputs()
    condition, null = model.condition(PROMPTS), model.condition([None] * 4)
    want = np.asarray(model(z, t, condition))
    ready = model.prepare(Step(t, 0.1), model.precompute(condition), model.precompute(null))
    np.testing.assert_allclose(np.asarray(model(z, t, ready[0])), want, atol=2e-5)
    given, without = model.guided(z, t, *ready)
    np.testing.assert_allclose(np.asarray(given), want, atol=2e-5)
    np.testing.assert_allclose(np.asarray(without), np.asarray(model(z, t, null)), atol=2e-5)
    sample = SampleConfig("heun", 3, 2.0, 0.0, 1.0)
    ends = [list(Sampler(model, FlowConfig(), sample, c).states(z, PROMPTS))[-1].z for c in (False, True)]
    np.testing.assert_allclose(np.asarray(ends[0]), np.asarray(ends[1]), atol=1e-4)


def test_every_parameter_has_a_gradient():
    model, (z, _) = network(), inputs()
    t = mx.array([0.1, 0.4, 0.7, 0.9])

    def loss(parameters):
        model.update(parameters)
        return training_loss(model, z, model.condition(PROMPTS), t, z[::-1], FlowConfig())

    gradients = dict(tree_flatten(mx.grad(loss)(model.trainable_parameters())))
    assert {"word_table.weight", "mask_token", "y_embedder.proj.weight", "in_context_posemb"} <= set(gradients)
    assert all(np.abs(np.asarray(g)).max() > 0 for g in gradients.values())


def test_features_of_an_encoder():
    model, (z, t) = network(TextConfig("some/encoder", 6, 4)), inputs(2)
    rows = {"one": np.ones((2, 6), np.float32), "two": np.full((4, 6), 2, np.float32)}
    model.features = lambda prompts: [rows[p] for p in prompts]
    condition = model.condition(["one", "two"])
    np.testing.assert_array_equal(np.asarray(condition["mask"]).sum(axis=1), [2, 4])
    assert model(z, t, condition).shape == (2, 3, 16, 16)


def test_roles_of_parameters():
    shapes = parameter_shapes(network().config)
    products = {k for k in shapes if ARCHITECTURE.is_product_operand(k)}
    assert {"y_embedder.proj.weight", "blocks.0.attn.qkv.weight"} <= products
    assert not products & {"mask_token", "word_table.weight", "in_context_posemb", "t_embedder.mlp.0.weight"}
    assert ARCHITECTURE.layer_kind("y_embedder.proj.weight") == "text_embedder"
    assert architecture("jit_text").lora_target("blocks.0.attn.qkv")


def test_sizes_that_do_not_fit():
    with pytest.raises(FieldError, match="num_classes is 3, want 0"):
        JiTTextConfig(num_classes=3)
    with pytest.raises(FieldError, match="text is None, want a TextConfig"):
        JiTTextConfig(text=None)
