"""What drawing with SenseNova-U1 takes of memory, by its two phases, before anything is read.

Weights, keys and values are counted exactly. Activations are an estimate from the shapes of one layer.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx

from ..device.defaults import on_gpu, total_memory
from ..errors import MlxSfError, option
from ..models import architecture, parameter_shapes
from ..models.quantize import QuantizationConfig, is_quantized, padded
from ..models.u1_config import U1Config
from ..models.u1_text import text_shapes
from .config import Config

# tokens of the two branches of an everyday prompt, with the published system message
PROMPT_TOKENS, EMPTY_TOKENS = 261, 9
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn: in which type, with quantised weights expanded to floats or not, how many at a time."""

    dtype: str
    expand: bool = False
    batch: int = 1
    guided: bool = True
    prompt_tokens: int = PROMPT_TOKENS


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes: keys and values of the prompts, one layer of the understanding side, the generation side, activations.

    `machine` is what MLX may use here.
    """

    name: str
    size: tuple[int, int]
    prefixes: int
    layer: int
    generation: int
    activations: int
    machine: int

    @property
    def first(self) -> int:
        """Peak of the first phase: two layers above the keys and values."""
        return self.prefixes + 2 * self.layer

    @property
    def second(self) -> int:
        """Peak of the second phase."""
        return self.prefixes + self.generation + self.activations

    @property
    def fits(self) -> bool:
        return max(self.first, self.second) <= self.machine

    def lines(self) -> list[str]:
        """The plan for people."""
        h, w = self.size
        return [
            f"{self.name}, {w} x {h} pixels (width x height)",
            f"first phase   {_gb(self.first)}: prompts, one layer after another; keys and values {_gb(self.prefixes)}",
            f"second phase  {_gb(self.second)}: generation side {_gb(self.generation)}, activations about "
            f"{_gb(self.activations)} (an estimate)",
            f"this machine  {_gb(self.machine)} for MLX",
        ]


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"


def plan(config: Config, how: Drawing) -> MemoryPlan:
    """The plan of a checkpoint of this configuration."""
    c: U1Config = config.model
    width, kind, shapes = _BYTES[how.dtype], architecture(c), parameter_shapes(c)
    q = None if how.expand else config.quantization
    generation = sum(_stored(k, s, width if kind.is_product_operand(k) else 4, q) for k, s in shapes.items())
    first_layer = ((k, math.prod(s)) for k, s in text_shapes(c).items() if k.startswith("layers.0."))
    layer = sum(count * (width if "proj" in k else 4) for k, count in first_layer)
    tokens = how.prompt_tokens + (EMPTY_TOKENS if how.guided else 0)
    prefixes = c.depth * 2 * c.num_kv_heads * c.head_dim * tokens * width
    return MemoryPlan(config.name, c.size, prefixes, layer, generation, _activations(c, width, how), _limit())


def check(config: Config, how: Drawing) -> MemoryPlan:
    """The plan; `MlxSfError` where it does not fit here says what would."""
    found = plan(config, how)
    if found.fits:
        return found
    other = next((words for words, p in _other_ways(config, how) if p.fits), None)
    raise MlxSfError(
        f"{found.name}: needs {_gb(max(found.first, found.second))}, this machine has {_gb(found.machine)}: "
        + (f"{other} would fit" if other else "no way to draw it that this program knows fits")
    )


def _stored(name: str, shape: tuple[int, ...], width: int, q: QuantizationConfig | None) -> int:
    if q is None or not is_quantized(name, q, architecture("sensenova_u1")):
        return math.prod(shape) * width
    row = padded(shape[1], q)
    return shape[0] * (row * q.bits // 8 + row // q.group_size * 2 * width)


def _activations(c: U1Config, width: int, how: Drawing) -> int:
    """The widest moment: two layers' worth of streams and feed-forwards, or the largest matrix on its way in."""
    tokens = c.tokens * how.batch * (2 if how.guided else 1)
    heads = (c.num_heads + 4 * c.num_kv_heads) * c.head_dim * width
    layer = 2 * tokens * (4 * 4 * c.hidden_size + max(3 * c.mlp_hidden * width, heads))
    embedder = c.tokens * how.batch * 4 * (3 * 4 * c.embed_width + 4 * 3 * c.patch_size**2)
    head = tokens * (16 * c.head_width * 4 if c.head == "conv" else 3 * c.token_size**2 * 4)
    reading = 3 * 4 * c.hidden_size * c.mlp_hidden
    pictures = 8 * how.batch * 3 * math.prod(c.size) * 4
    return max(layer, embedder, head, reading) + pictures


def _limit() -> int:
    """Bytes that MLX may use here: what Metal recommends, else the machine's memory."""
    if on_gpu():
        info = mx.device_info() if hasattr(mx, "device_info") else mx.metal.device_info()
        if recommended := info.get("max_recommended_working_set_size"):
            return int(recommended)
    return total_memory()


def _other_ways(config: Config, how: Drawing) -> Iterator[tuple[str, MemoryPlan]]:
    """Other ways to draw, the best first, in words that fit before "would fit"."""
    one = dataclasses.replace(how, batch=1)
    if how.batch > 1:
        yield f"{option('batch_size')} 1", plan(config, one)
    bits = (8, None, 4) if config.quantization is None and not how.expand else (None,)
    kind, largest, token = architecture(config.model), max(config.model.size), config.model.token_size
    for b in bits:
        changed = config if b is None else dataclasses.replace(config, quantization=QuantizationConfig(b).of(kind))
        copy = (
            "" if b is None else f"a copy in {b} bits (`mlx-sf convert`)" + (", with visible damage," if b == 4 else "")
        )
        for side in (largest, 1024, 512):
            if side > largest or side % token or (b is None and side == largest):
                continue
            words = [copy] if copy else []
            words += [f"{side} x {side} pixels"] if side < largest else []
            yield " at ".join(words), plan(changed if side == largest else changed.at(side, side), one)
