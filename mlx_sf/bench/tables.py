"""Results as tables for pages and for the suite: the columns and cells of each kind of measurement."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """Cells in words, and a caption above them ("" where none is needed)."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""

    def markdown(self) -> list[str]:
        """The table's lines, without the caption."""
        lines = [self.columns, ("---",) * len(self.columns), *self.rows]
        return ["| " + " | ".join(cells) + " |" for cells in lines]


TIMED = ("what", "mlx-sf", "PyTorch", "PyTorch / mlx-sf", "share of product rate", "peak memory")


def timed_row(r: Result) -> tuple[str, ...]:
    """A comparison by turns with PyTorch (`peer.compared`), under the columns `TIMED`."""
    other = f"{r['torch_seconds']:.2f} s ({r['torch_spread']})" if "torch_seconds" in r else ""
    ratio = f"{r['torch_over_mlx']:.2f}" if "torch_over_mlx" in r else ""
    share = f"{r['share_of_product_rate']:.0%}" if "share_of_product_rate" in r else ""
    ours = f"{r['mlx_seconds']:.2f} s ({r['mlx_spread']})"
    return r["what"], ours, other, ratio, share, _gigabytes(r["mlx_peak_bytes"])


def forcing_row(r: Result) -> tuple[str, ...]:
    """The forcing under the columns `TIMED`."""
    times, shared = (f"{1000 * r[f'forcing_{k}_seconds']:.1f} ms" for k in ("per_image", "shared"))
    of = " and ".join(f"{r[f'share_of_forward_{k}']:.2%}" for k in ("per_image", "shared"))
    what = f"forcing, {r['what']}: a time per image, shared"
    return what, f"{times}, {shared}: {of} of a forward", "", "", f"{r['share_of_product_rate']:.0%}", ""


def fid_row(r: Result) -> tuple[str, ...]:
    """Inception features under the columns `TIMED`."""
    ratio = f"{r['speed_over_peer']:.2f}" if "speed_over_peer" in r else ""
    ours, peer = _images(r, "mlx_sf"), _images(r, "torch_fidelity")
    return "FID features, 256 x 256 pictures", ours, peer, ratio, "", _gigabytes(r["network_peak_bytes"])


def convert_row(r: Result) -> tuple[str, ...]:
    """A conversion under the columns `TIMED`."""
    return "converting a checkpoint", f"{r['seconds']:.1f} s", "", "", "", _gigabytes(r["peak_bytes"])


def timed(r: Result) -> list[Table]:
    return [Table(TIMED, (timed_row(r),))]


def t2i(r: Result) -> list[Table]:
    """A guided evaluation, the encoder, whole pictures."""
    columns = (
        "what",
        "mlx-sf",
        "PyTorch, attention written out",
        "PyTorch, fused",
        "ratios",
        "share of product rate",
        "peak memory",
    )
    share = f"{r['share_of_product_rate']:.0%}"
    memory = _gigabytes(r["evaluation"]["mlx_peak_bytes"])
    rows = [
        _t2i_row("guided evaluation", r["evaluation"], share, memory),
        _t2i_row(r["encoder"]["what"], r["encoder"], "", ""),
    ]
    drawn = tuple(
        (
            name,
            str(p["evaluations"]),
            f"{p['seconds']:.0f} s",
            "drawn once" if p["measured"] else "estimated: evaluations x time",
        )
        for name, p in r["pictures"].items()
    )
    return [
        Table(columns, tuple(rows), r["what"]),
        Table(("one picture", "evaluations of the network", "time", ""), drawn, "Whole pictures, without the encoder"),
    ]


def _t2i_row(what: str, r: Result, share: str, memory: str) -> tuple[str, ...]:
    names = ("mlx", "torch_explicit", "torch_fused")
    times = [f"{r[f'{n}_seconds']:.2f} s ({r[f'{n}_spread']})" if f"{n}_seconds" in r else "" for n in names]
    ratios = ", ".join(f"{r[f'{n}_over_mlx']:.2f}" for n in names[1:] if f"{n}_over_mlx" in r)
    return what, *times, ratios, share, memory


def t2i_memory(r: Result) -> list[Table]:
    rows = tuple(
        (c["what"], f"not measured: {c['error']}" if "error" in c else f"{c['mlx_peak'] / 1e9:.2f} GB")
        for c in r["phases"]
    )
    return [Table(("phase", "peak of MLX's buffers"), rows, r["what"])]


def profile(r: Result) -> list[Table]:
    low, high = r["spread"]
    rows = [("whole step", f"{r['seconds']:.3f} s ({low:.3f} to {high:.3f})", "")]
    rows += [(name, f"{s:.4f} s", f"{s / r['seconds']:.1%}") for name, s in r["parts"].items()]
    return [Table(("part", "time", "share of the step"), tuple(rows), r["what"])]


def fid(r: Result) -> list[Table]:
    columns = ["mlx-sf", "torch-fidelity", "torch-fidelity, channels-last", "ratio", "ratio, channels-last", "memory"]
    features = (
        *(_images(r, name) for name in ("mlx_sf", "torch_fidelity", "torch_fidelity_channels_last")),
        *(f"{r[k]:.2f}" if k in r else "" for k in ("speed_over_peer", "speed_over_peer_channels_last")),
        _gigabytes(r["network_peak_bytes"]),
    )
    distance = tuple(
        form.format(r[k]) if k in r else ""
        for k, form in (
            ("distance_seconds", "{:.2f} s"),
            ("torch_fidelity_distance_seconds", "{:.2f} s"),
            ("distance_speed_over_peer", "{:.1f}"),
            ("distance_relative_difference", "{:.0e}"),
        )
    )
    size, count = r["img_size"], r["statistics_of_images"]
    memory = (
        f"{r['statistics_bytes'] / 1e6:,.0f} MB",
        f"{r['statistics_and_distance_bytes'] / 1e6:,.0f} MB",
        f"{r['statistics_seconds']:.1f} s",
    )
    return [
        Table(tuple(columns), (features,), f"Features of {size} x {size} pictures, batch {r['batch_size']}"),
        Table(
            ("mlx-sf", "torch-fidelity", "ratio", "relative difference"),
            (distance,),
            "Fréchet distance of two Gaussians of 2048 dimensions, full rank",
        ),
        Table(
            ("statistics over the interpreter", "with the distance", "time"),
            (memory,),
            f"Statistics of {count:,} pictures' features, without the network",
        ),
    ]


def convert(r: Result) -> list[Table]:
    columns = ("file read", "file written", "time", "peak memory", "peak over the interpreter")
    over = f"{r['peak_over_interpreter'] / 1e6:,.0f} MB"
    sizes = (_gigabytes(r["input_bytes"]), _gigabytes(r["output_bytes"]))
    return [Table(columns, ((*sizes, f"{r['seconds']:.1f} s", _gigabytes(r["peak_bytes"]), over),))]


FORMS = {"forcing": "this project's", "textbook": "textbook", "even_odd": "even/odd split"}


def forcing(r: Result) -> list[Table]:
    columns = ("form", "a time per image", "one shared time", "share of a forward pass")

    def cell(name: str) -> str:
        low, high = (1000 * s for s in r["fastest_and_slowest"][name])
        return f"{1000 * r[f'{name}_seconds']:.1f} ms ({low:.1f} to {high:.1f})"

    rows = []
    for form, title in FORMS.items():
        if f"{form}_shared_seconds" in r:
            times = [r[f"{form}_{kind}_seconds"] / r["forward_seconds"] for kind in ("per_image", "shared")]
            share = " and ".join(f"{t:.2%}" for t in times)
            rows.append((title, cell(f"{form}_per_image"), cell(f"{form}_shared"), share))
    caption = (
        f"{r['what']}; forward pass {r['forward_seconds']:.2f} s; the forcing has {r['share_of_forward_flops']:.1%} of "
        f"its multiplications and runs at {r['share_of_product_rate']:.0%} of the product rate"
    )
    return [Table(columns, tuple(rows), caption)]


def quantization(r: Result) -> list[Table]:
    kinds = [(what, bits) for what in ("velocity", "output") for bits in (8, 4)]
    errors = [
        (
            row["layers"].replace("_", " "),
            f"{row['share']:.1%}",
            *(f"{row[f'{what}_error_{bits}']:.2%}" for what, bits in kinds),
        )
        for row in r["rows"]
    ]
    columns = ("quantised", "share of weights", *(f"{what}, {bits} bits" for what, bits in kinds))
    sizes = tuple(f"{v / 1e6:,.1f} MB" for v in r["file_bytes"].values())
    tables = [
        Table(columns, tuple(errors), f"Relative error against float32: {r['what']}"),
        Table(tuple(r["file_bytes"]), (sizes,), "Tensors in a file"),
    ]
    if speed := r["speed"]:
        names = ("float32", "8_bits", "4_bits")
        times = tuple(f"{speed[f'{name}_seconds']:.3g} s" for name in names)
        ratios = tuple(f"{speed[f'{name}_over_float32']:.3g}" for name in names[1:])
        heads = ("float32", "8 bits", "4 bits", "8 bits / float32", "4 bits / float32")
        tables.append(Table(heads, ((*times, *ratios),), speed["what"]))
    return tables


def memory(r: Result) -> list[Table]:
    tables = []
    for task, own, title in (("sample", "loading", "Sampling"), ("train", "state", "Training, after the first step")):
        rows = tuple(_memory_row(c, own) for c in r["cells"] if c["task"] == task)
        columns = ("model", "batch", "", "weights", own, "peak of MLX's buffers", "whole process")
        if rows:
            tables.append(Table(columns, rows, f"{title}: GB"))
    return tables


def _memory_row(c: Result, own: str) -> tuple[str, ...]:
    extra = [c["dtype"], f"{c['bits']} bits" if c["bits"] else "", "checkpointing" if c["grad_checkpoint"] else ""]
    head = (f"{c['size']} at {c['img_size']}", str(c["batch"]), ", ".join(e for e in extra if e))
    if "error" in c:
        return (*head, "not measured", "", "", "")
    return (*head, *(f"{c[k] / 1e9:.2f}" for k in ("weights", own, "mlx_peak", "process_peak")))


def solvers(r: Mapping[str, Sequence[Result]]) -> list[Table]:
    def rows(measured: Sequence[Result]) -> Iterator[tuple[str, ...]]:
        for method in dict.fromkeys(m["method"] for m in measured):
            own = [m for m in measured if m["method"] == method]
            yield method, ", ".join(f"{m['evaluations']}: {m['distance']:.4f}" for m in own)

    columns = ("solver", "network evaluations per image: distance")
    return [Table(columns, tuple(rows(measured)), case) for case, measured in r.items()]


# what a group of golden comparisons (a file of tests/golden/parity, and what is in it) compares
GOLDEN = {
    "operator.npz": "operator: transforms, masks, filters",
    "forward.npz outputs and velocities": "network outputs and velocities",
    "fullsize.npz": "JiT-B/32 at 256, real size",
    "loss.npz losses and states": "loss and its inputs",
    "loss.npz gradients": "gradients of every parameter, eager and compiled",
    "sample.npz states": "Euler and Heun states",
    "train.npz trajectories": "ten training steps: losses, weights, both EMAs",
}


def parity(r: Result) -> list[Table]:
    columns = ("golden numbers", "comparisons", "largest error, as a share of its tolerance")
    rows = [(GOLDEN.get(g["group"], g["group"]), str(g["comparisons"]), f"{g['largest']:.1%}") for g in r["groups"]]
    return [Table(columns, tuple(rows))]


def _images(r: Result, name: str) -> str:
    key = f"{name}_images_per_second"
    return f"{r[key]:.1f} images/s ({r[f'{name}_spread']})" if key in r else ""


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB"
