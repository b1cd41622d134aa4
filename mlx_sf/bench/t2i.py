"""Text to image: a guided evaluation and the encoder against PyTorch, by turns; whole pictures; peak memory by phase.

Weights are made up, shapes are the published ones. The PyTorch peer holds the same arithmetic (`parity.torch_mmjit`),
with attention written out, as the authors publish it, and fused.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..device.defaults import compile_by_default, dtype_name
from ..device.lanes import cores
from ..errors import MlxSfError
from ..flow import FlowConfig
from ..models import architecture, build, cast_products, parameter_shapes
from ..models.flops import forward_flops
from ..models.mmjit import MMJiTConfig, model_config
from ..models.mmjit_mf import PUBLISHED_GUIDANCE, MMJiTMFConfig
from ..models.quantize import QuantizationConfig, quantize, quantize_layers
from ..models.t5 import T5Config, T5Layer, encode
from ..sampling.generate import ahead
from ..sampling.noise import seeded_noise
from ..sampling.sampler import Sampler
from ..sampling.solvers import SampleConfig, evaluations
from .peer import Peer, find_peer
from .rates import Runs, alternate, product_rate, timing

_TOKENS = 32  # of a prompt
_PICTURES = {
    "100 Euler steps": SampleConfig("euler", 100, 2.5, 0.0, 1.0, 0.001),
    "25 multistep steps": SampleConfig("multistep", 25, 2.5, 0.0, 1.0, 0.001),
    "4 steps of the student": SampleConfig("euler", 4, *PUBLISHED_GUIDANCE),
}


def measure_t2i(
    size: str,
    img_size: int,
    dtype: mx.Dtype,
    rounds: int = 3,
    peer: bool = True,
    pictures: bool = False,
    encoder: T5Config | None = None,
) -> dict[str, Any]:
    """Seconds of a guided evaluation and of the encoder in MLX and, where torch is installed and wanted, in PyTorch.

    The text has been through its own blocks before, in both. With `pictures` whole ones are drawn, once each; without,
    their times are an evaluation's times their number, and are called estimates. `encoder` is FLAN-T5-Large by default.
    """
    config = config_of(size, img_size)
    network = _network(config, dtype)
    sample, z = SampleConfig("euler", 100, 2.5, 0.0, 1.0), seeded_noise([0], config.size)
    mx.eval(z)
    field = Sampler(network, FlowConfig(), sample, compile_by_default()).field(["a prompt"])
    times = iter(np.linspace(0.1, 0.9, 1000).tolist())  # a time that was not visited, as in a loop
    runs: Runs = {"mlx": lambda: mx.eval(field(z, next(times), 2.5, 0.01))}
    other = find_peer(dtype, peer)
    if other is not None:
        for name, fused in (("torch_explicit", False), ("torch_fused", True)):
            runs[name] = _torch_evaluation(config, other, fused)
    mx.reset_peak_memory()
    taken = alternate(runs, rounds)
    peak, rate, flops = mx.get_peak_memory(), product_rate(dtype), 2 * forward_flops(config)
    runs.clear()
    result: dict[str, Any] = {
        "what": f"MM-JiT {size} at {img_size}, one picture, {dtype_name(dtype)}",
        "threads": cores(),
        "rounds": rounds,
        "evaluation": _figures(taken, peak),
        "flops": flops,
        "product_rate": rate,
        "share_of_product_rate": flops / timing("mlx", taken["mlx"])["mlx_seconds"] / rate,
        **(other.described if other else {}),
        "encoder": _measure_encoder(encoder or T5Config(), dtype, rounds, other),
    }
    each = result["evaluation"]["mlx_seconds"]
    result["pictures"] = dict(_pictures(config, network, dtype, each, pictures))
    return result


def config_of(size: str, img_size: int) -> MMJiTConfig:
    """The configuration of a size with its patch, "B/16"."""
    name, _, patch = size.partition("/")
    if not patch.isdigit():
        raise MlxSfError(f"size {size!r} says no patch, want one such as B/16")
    return model_config(name, int(patch), img_size)


def _features(config: MMJiTConfig) -> Callable[[Any], list[np.ndarray]]:
    """Made-up features of prompts."""
    values = np.random.default_rng(0).standard_normal((_TOKENS, config.text.width), dtype=np.float32)
    return lambda prompts: [values for _ in prompts]


def _network(config: MMJiTConfig, dtype: mx.Dtype) -> Any:
    """A network with random weights that is given features, evaluated."""
    network = build(config)
    network.features = _features(config)
    network.update(cast_products(network.parameters(), dtype, architecture(config)))
    mx.eval(network.parameters())
    return network


def _figures(taken: dict[str, list[float]], peak: int) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for name, seconds in taken.items():
        figures |= timing(name, seconds)
    for name in ("torch_explicit", "torch_fused"):
        if name in taken:
            figures[f"{name}_over_mlx"] = figures[f"{name}_seconds"] / figures["mlx_seconds"]
    return figures | {"mlx_peak_bytes": peak}


def _torch_evaluation(config: MMJiTConfig, peer: Peer, fused: bool) -> Callable[[], None]:
    """One guided evaluation in PyTorch: both branches in one batch, the text done before."""
    import torch

    from ..parity.torch_mmjit import TorchMMJiT

    t = config.text
    network = TorchMMJiT(
        image_size=config.img_size, patch_size=config.patch_size, hidden_size=config.hidden_size,
        num_heads=config.num_heads, head_dim=config.head_dim, depth_double=config.depth,
        txt_preamble_depth=config.text_depth, txt_input_size=t.width, prompt_length=t.length,
        pca_channels=config.bottleneck_dim, mlp_hidden=config.mlp_hidden, fused=fused,
    ).eval().to(peer.device)  # fmt: skip
    step = torch.compile(network.image) if peer.device == "cuda" else network.image
    z = torch.randn(1, 3, *config.size, device=peer.device)
    context = torch.randn(2, t.length, t.width, device=peer.device)
    mask = torch.tensor([[1.0] * _TOKENS + [0.0] * (t.length - _TOKENS), [0.0] * t.length], device=peer.device)
    with torch.inference_mode():
        text = network.text(context, mask)

    def run() -> None:
        with torch.inference_mode(), peer.autocast():
            given, without = step(torch.cat([z, z]), text).chunk(2)
            (without + 2.5 * (given - without) - z) / 0.5
        peer.synchronize()

    return run


def _measure_encoder(config: T5Config, dtype: mx.Dtype, rounds: int, peer: Peer | None) -> dict[str, Any]:
    """An encoder on one text of 256 tokens, its weights in memory."""
    ids = list(range(1000, 1256))
    tensors = {name: 0.02 * mx.random.normal(shape) for name, shape in _encoder_tensors(config).items()}
    mx.eval(tensors)
    read = tensors.__getitem__
    compute = mx.float32 if dtype == mx.float32 else mx.bfloat16
    runs: Runs = {
        "mlx": lambda: encode(config, read, lambda rows: tensors["shared.weight"][mx.array(rows)], [ids], compute)
    }
    if peer is not None:
        import torch

        from ..parity.torch_mmjit import TorchT5Encoder

        encoder = (
            TorchT5Encoder(
                vocab_size=config.vocab_size,
                d_model=config.d_model,
                num_layers=config.num_layers,
                num_heads=config.num_heads,
                d_kv=config.d_kv,
                d_ff=config.d_ff,
            )
            .eval()
            .to(peer.device)
        )
        tokens, mask = torch.tensor([ids], device=peer.device), torch.ones(1, len(ids), device=peer.device)

        def run() -> None:
            with torch.inference_mode(), peer.autocast():
                encoder(tokens, mask)
            peer.synchronize()

        runs["torch_explicit"] = run
    taken = alternate(runs, rounds)
    return _figures(taken, 0) | {
        "what": f"T5 encoder of {config.num_layers} layers, width {config.d_model}, one text of 256 tokens"
    }


def _encoder_tensors(config: T5Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an encoder's tensors."""
    from mlx.utils import tree_flatten

    layer: Any = tree_flatten(T5Layer(config).parameters())
    shapes = {f"encoder.block.{i}.{k}": v.shape for i in range(config.num_layers) for k, v in layer}
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    return {
        "shared.weight": (config.vocab_size, config.d_model),
        bias: (config.relative_attention_num_buckets, config.num_heads),
        "encoder.final_layer_norm.weight": (config.d_model,),
        **shapes,
    }


def _pictures(
    config: MMJiTConfig, network: Any, dtype: mx.Dtype, each: float, draw: bool
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Seconds of whole pictures, without the encoder: drawn once each, or estimated from the evaluations' number."""
    for name, sample in _PICTURES.items():
        student = "student" in name
        count = sample.steps if student else evaluations(sample)
        if not draw:
            yield name, {"evaluations": count, "seconds": each * (count / 2), "measured": False}
            continue
        drawing = _network(MMJiTMFConfig(**vars(config)), dtype) if student else network
        sampler = Sampler(drawing, FlowConfig(noise_scale=2.0), sample, compile_by_default())
        started = time.perf_counter()
        for _ in ahead(sampler.states(seeded_noise([0], config.size), ["a prompt"])):
            pass
        yield name, {"evaluations": count, "seconds": time.perf_counter() - started, "measured": True}


# ------------------------------------------------------------------------------------------------ memory


@dataclasses.dataclass(frozen=True)
class Phase:
    """What is held in memory at once: the encoder, the network drawing one picture, or an adapter in training.

    `held` is float32, bfloat16 or 8-bit, of the weights; `batch` counts pictures of a training step.
    """

    task: str
    held: str = "float32"
    batch: int = 1

    @property
    def label(self) -> str:
        if self.task == "adapter":
            return f"adapter of rank 32, batch {self.batch}, blocks computed again, {self.held}"
        return {"encoder": "encoder, 256 tokens", "network": "network, one picture"}[self.task] + f", {self.held}"


PHASES = (
    *(Phase("encoder", held) for held in ("float32", "bfloat16", "8-bit")),
    *(Phase("network", held) for held in ("float32", "bfloat16", "8-bit")),
    *(Phase("adapter", "float32", batch) for batch in (1, 4)),
)


def measure_t2i_memory(
    size: str,
    img_size: int,
    on_phase: Callable[[], None] | None = None,
    phases: Sequence[Phase] = PHASES,
) -> Iterator[dict[str, Any]]:
    """Each phase in a process of its own: the peak of MLX's buffers in bytes."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    for phase in phases:
        command = [sys.executable, "-m", "mlx_sf.bench.t2i", json.dumps([size, img_size, dataclasses.asdict(phase)])]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        record: dict[str, Any] = {"what": phase.label, **dataclasses.asdict(phase)}
        if done.returncode:
            record["error"] = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        else:
            record |= json.loads(done.stdout.splitlines()[-1])
        yield record
        if on_phase is not None:
            on_phase()


def _phase(size: str, img_size: int, phase: Phase) -> dict[str, Any]:
    """Run one phase here."""
    config = config_of(size, img_size)
    mx.set_cache_limit(0)  # what is freed is free
    started = time.perf_counter()
    if phase.task == "encoder":
        _encode_once(phase.held)
    elif phase.task == "network":
        _draw_once(config, phase.held)
    else:
        _train_once(config, phase.batch)
    return {"mlx_peak": mx.get_peak_memory(), "seconds": time.perf_counter() - started}


def _encode_once(held: str) -> None:
    config = T5Config()
    shapes = _encoder_tensors(config)
    dtype = mx.bfloat16 if held == "bfloat16" else mx.float32
    random = lambda shape: 0.02 * mx.random.normal(shape)  # noqa: E731  made when asked for, as a file is read
    encode(
        config,
        lambda name: random(shapes[name]),
        lambda rows: random((len(rows), config.d_model)),
        [list(range(1000, 1256))],
        dtype,
        8 if held == "8-bit" else None,
    )


def _draw_once(config: MMJiTConfig, held: str) -> None:
    """One guided evaluation."""
    kind, q = architecture(config), QuantizationConfig(8).of(architecture(config))
    network = build(config)
    network.features = _features(config)
    if held == "8-bit":
        quantize_layers(network, q, kind)
    loaded = []
    for name, shape in parameter_shapes(config).items():
        value = 0.02 * mx.random.normal(shape)
        if held == "8-bit" and name.endswith(".weight") and kind.layer_kind(name) in q.layers:
            base = name.removesuffix("weight")
            parts = dict(zip((name, base + "scales", base + "biases"), quantize(value, q), strict=True))
        else:
            parts = cast_products({name: value}, mx.float32 if held == "float32" else mx.bfloat16, kind)
        mx.eval(parts)
        loaded += list(parts.items())
        del value, parts
    network.load_weights(loaded, strict=True)
    del loaded
    sample = SampleConfig("euler", 100, 2.5, 0.0, 1.0)
    field = Sampler(network, FlowConfig(noise_scale=2.0), sample).field(["a prompt"])
    mx.eval(field(seeded_noise([0], config.size), 0.5, 2.5, 0.01))


def _train_once(config: MMJiTConfig, batch: int) -> None:
    """Two steps of the published adapter, blocks computed a second time instead of kept."""
    from ..models.lora import LoRAConfig, adapter_parameters, add_adapter, initial_adapter, targets_of
    from ..training.optimizer import AdamW
    from ..training.step import StepOptions, TrainStep, draws, initial_arrays

    network, shapes = _network(config, mx.float32), parameter_shapes(config)
    lora = LoRAConfig(32, 32.0, targets_of(shapes, architecture(config)))
    add_adapter(network, lora, initial_adapter(lora, shapes, mx.random.key(0)))
    arrays = initial_arrays(adapter_parameters(network))
    options = StepOptions(AdamW(0.9, 0.999), clip_grad=1.0, grad_checkpoint=True)
    step = TrainStep(network, FlowConfig(noise_scale=2.0, label_drop_prob=0.0), options)
    images = np.zeros((batch, *config.size, 3), np.uint8)
    condition, null = network.condition(["a"] * batch), network.condition([None] * batch)
    for i in range(2):
        numbers = draws(0, i, batch, slice(0, batch), config.size)
        arrays, loss, norm = step(arrays, images, condition, null, numbers, 5e-4, i + 1, (0.999, 0.9999))
        mx.eval(arrays, loss, norm)


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    print(json.dumps(_phase(asked[0], asked[1], Phase(**asked[2]))))
