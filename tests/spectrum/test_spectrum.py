"""The spectrum: measured right on fields of known power law, its verdicts on known spectra, its refusals."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlx_sf.data.sources import FolderSource, SceneSource
from mlx_sf.dct import dct_matrix
from mlx_sf.errors import MlxSfError
from mlx_sf.flow import FlowConfig, training_times
from mlx_sf.spectral import ForcingConfig, masks
from mlx_sf.spectrum import meter as metering
from mlx_sf.spectrum.meter import CHANNELS, ROUNDING_POWER, Meter, Rings, Spectrum, check_sizes, measure
from mlx_sf.spectrum.power_law import fit_power_law
from mlx_sf.spectrum.ratio import contour, data_schedule, data_to_noise, paper_contour, schedule_of
from mlx_sf.spectrum.verdict import assess, judge, training_share
from mlx_sf.training.options import read_cutoffs


def radius(n: int) -> np.ndarray:
    return np.hypot(np.arange(n)[:, None], np.arange(n)[None, :])


def amplitude_for(n: int, alpha: float, variance: float = 0.02) -> float:
    """A at which fields of side n have this variance: small enough not to be clipped."""
    k = radius(n)
    return float(variance * n * n / (k[k > 0] ** -alpha).sum())


def fields(n: int, alpha: float, a: float, count: int, seed: int) -> np.ndarray:
    """(count, 3, n, n) normal fields whose DCT coefficients have power a k^-alpha, and no mean."""
    k = radius(n)
    k[0, 0] = np.inf
    d = dct_matrix(n).astype(np.float32)
    e = np.random.default_rng(seed).standard_normal((count, 3, n, n), dtype=np.float32)
    return d.T @ (e * np.sqrt(a * k**-alpha).astype(np.float32)) @ d


def spectrum_of(images: np.ndarray, window: int | None = None, floor: float = 0.0) -> Spectrum:
    meter = Meter(images.shape[-1], window, floor)
    meter.add(images)
    return meter.finish()


def known(n: int, power: np.ndarray) -> Spectrum:
    """A spectrum with exactly these ring powers in every channel."""
    groups = np.zeros((8, len(power), 6))
    groups[..., :3] = power[:, None]
    return Spectrum(n, n, groups, np.ones(8))


def law_spectrum(n: int, a: float, alpha: float) -> Spectrum:
    k = Rings(n).k.astype(float)
    return known(n, a * np.maximum(k, 1) ** -alpha)


# ---- measuring -------------------------------------------------------------------------------------------------


def test_white_noise_has_its_variance_at_every_frequency_whatever_the_size() -> None:
    for n in (16, 64):
        x = 0.3 * np.random.default_rng(n).standard_normal((40, 3, n, n))
        s = spectrum_of(x)
        for channel in ("mean", "red", "green", "blue"):
            share = s.power(channel) / 0.09 - 1
            assert np.all(np.abs(share) < 6 * np.sqrt(2 / (40 * s.rings.counts))), channel
        assert s.power("luminance")[5:].mean() == pytest.approx(0.09 * (0.299**2 + 0.587**2 + 0.114**2), rel=0.1)


def test_one_wave_lies_in_its_ring_with_its_power() -> None:
    d = dct_matrix(32)
    wave = 3 * np.outer(d[6], d[8])  # one coefficient of 3, at k = 10
    x = np.broadcast_to(wave, (8, 3, 32, 32)) * np.array([1.0, 0.5, -0.5])[:, None, None]
    s = spectrum_of(x)
    total = {c: s.power(c) * s.rings.counts for c in CHANNELS}
    assert total["red"][10] == pytest.approx(9, rel=1e-5)
    assert total["mean"][10] == pytest.approx(9 * (1 + 0.25 + 0.25) / 3, rel=1e-5)
    assert total["luminance"][10] == pytest.approx(9 * (0.299 + 0.5 * 0.587 - 0.5 * 0.114) ** 2, rel=1e-5)
    assert np.delete(total["red"], 10).max() < 1e-9


def test_windows_are_what_the_forcing_transforms() -> None:
    x = fields(32, 2, 5.0, 9, 0)
    s = spectrum_of(x, window=8)
    pieces = x.reshape(9, 3, 4, 8, 4, 8).transpose(0, 2, 4, 1, 3, 5).reshape(-1, 3, 8, 8)
    assert s.power() == pytest.approx(spectrum_of(pieces).power(), rel=1e-5)
    assert (s.n, s.img_size) == (8, 32)


def test_pooling_images_for_the_bootstrap_loses_none(monkeypatch: pytest.MonkeyPatch) -> None:
    x = fields(16, 2, 5.0, 45, 0)
    whole = spectrum_of(x)
    monkeypatch.setattr(metering, "MAX_GROUPS", 8)
    pooled = spectrum_of(x)
    assert len(pooled.sizes) <= 8
    assert pooled.count == 45
    assert pooled.power() == pytest.approx(whole.power(), rel=1e-12)


def test_pictures_come_through_the_training_crop(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(12):
        picture = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
    source = FolderSource(tmp_path, (16, 16))
    s = measure(source, 100)
    x = np.stack([source.load(i)[0] for i in range(12)]).transpose(0, 3, 1, 2) / 127.5 - 1
    assert s.count == 12
    assert s.power() == pytest.approx(spectrum_of(x).power(), rel=1e-4)


# ---- the power law ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "count", "repetitions"), [(64, 12, 10), (128, 10, 5), (256, 8, 3)])
def test_known_fields_are_recovered_within_the_stated_intervals(n: int, count: int, repetitions: int) -> None:
    """As 8-bit pictures. 95 % intervals: of all these, about one in twenty may miss, and none by far."""
    inside = total = 0
    for alpha in (1.5, 2.0, 2.5, 3.0):
        a = amplitude_for(n, alpha)
        for i in range(repetitions):
            x = np.round(127.5 * (np.clip(fields(n, alpha, a, count, i), -1, 1) + 1)) / 127.5 - 1
            law = fit_power_law(spectrum_of(x, floor=ROUNDING_POWER))
            assert law.poor is None
            assert law.r2 > 0.98
            assert law.alpha.high - law.alpha.low < 6 / n  # not right by being vague
            for truth, got in ((np.log(a), np.log(_three(law.amplitude))), (alpha, _three(law.alpha))):
                total += 1
                inside += got[1] <= truth <= got[2]
                assert abs(got[0] - truth) < 2 * (got[2] - got[1])
    assert inside >= 0.9 * total, f"{inside} of {total}"


def _three(i) -> np.ndarray:
    return np.array([i.value, i.low, i.high])


def test_an_exact_law_is_exact_at_any_ring_width() -> None:
    rings = Rings(64)
    k = np.where(rings.radius == 0, 1, rings.radius)
    law = fit_power_law(known(64, rings.mean(7.0 * k**-2.3)), low=1)
    assert law.alpha.value == pytest.approx(2.3, abs=1e-6)
    assert law.amplitude.value == pytest.approx(7, rel=1e-6)
    assert law.at(np.array([2.0]))[0] == pytest.approx(7 * 2**-2.3, rel=1e-6)
    assert law.residual_db < 1e-5


def test_a_curved_spectrum_and_a_bump_are_called_poor() -> None:
    k = np.maximum(Rings(64).k, 1).astype(float)
    assert "slope changes" in (fit_power_law(known(64, 5 * k**-1.5 * np.exp(-k / 30))).poor or "")
    bump = 5 * k**-2 * (1 + 30 * np.exp(-(((k - 32) / 2) ** 2)))
    assert "off the line" in (fit_power_law(known(64, bump)).poor or "")


def test_rings_that_hold_only_rounding_are_left_out() -> None:
    k = np.maximum(Rings(64).k, 1).astype(float)
    s = known(64, 20 * k**-4 + ROUNDING_POWER)
    law = fit_power_law(Spectrum(64, 64, s.groups, s.sizes, ROUNDING_POWER))
    assert law.alpha.value == pytest.approx(4, abs=0.05)
    assert law.high < 40


# ---- data against noise ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [1.0, 2.0])
def test_contour_of_a_power_law_is_the_closed_form(sigma: float) -> None:
    a, alpha = 300.0, 2.2
    s, t = law_spectrum(256, a, alpha), np.array([0.3, 0.4, 0.5, 0.7, 0.85])
    k = (a * t**2 / ((1 - t) ** 2 * sigma**2)) ** (1 / alpha)
    assert contour(s.k, s.power(), t, sigma) == pytest.approx(k, rel=1e-9)
    assert contour(s.k, s.power(), t, sigma, 4.0) == pytest.approx(k * 4 ** (-1 / alpha), rel=1e-9)
    ratio = data_to_noise(a * k[[2]] ** -alpha, t[[2]], sigma)
    assert ratio == pytest.approx(1.0)
    # where no band stands out, and where all do
    assert contour(s.k, s.power(), np.array([0.0, 1e-4, 0.9999, 1.0]), sigma).tolist() == [0, 0, s.k[-1], s.k[-1]]


def test_the_papers_contour_is_ours_without_amplitude_and_t_squared() -> None:
    t = np.array([0.0, 0.5, 0.9])
    assert paper_contour(t, 2.0) == pytest.approx([1, 2, 10])


def test_noise_scale_2_moves_the_contour_and_not_the_published_cutoff() -> None:
    s, model = law_spectrum(256, 300, 2.0), ForcingConfig()
    one, two = (assess(s, model, FlowConfig(noise_scale=v)) for v in (1.0, 2.0))
    for a, b in zip(one, two, strict=True):
        assert (a.cutoff, a.kept, a.signal_lost, a.noise_removed) == (b.cutoff, b.kept, b.signal_lost, b.noise_removed)
        if 2 < a.contour_k < 360:
            assert b.contour_k == pytest.approx(a.contour_k / 2)  # 2^(2 / alpha)
            assert b.ratio == pytest.approx(a.ratio / 4)


def test_energies_of_a_known_mask() -> None:
    """Four by four, by hand: a cutoff between k = 1.5 and 2, so hard that the mask is 0 or 1."""
    r = 1.75 / (np.sqrt(2) * 3)
    model = ForcingConfig(scale_schedule="data", schedule_cutoffs=(r, r, 1.0), mask_sharpness=1e4)
    s = known(4, np.array([50.0, 4.0, 1.0, 0.5, 0.25]))
    row = assess(s, model, FlowConfig(noise_scale=1.0), np.array([0.5]))[0]
    # passed: k = 0 and ring 1 (1, 1, 1.41)
    # cut: ring 2 (2, 2, 2.24, 2.24), ring 3 (2.83, 3, 3, 3.16, 3.16), ring 4 (3.6, 3.6, 4.24)
    assert s.rings.counts.tolist() == [1, 3, 4, 5, 3]
    assert row.kept == pytest.approx(4 / 16)
    assert row.noise_removed == pytest.approx(12 / 16)
    assert row.signal_lost == pytest.approx((4 + 2.5 + 0.75) / (12 + 4 + 2.5 + 0.75))
    assert row.ratio == pytest.approx(np.exp(np.interp(1.75, [1, 2], np.log([4.0, 1.0]))))
    assert row.contour_k == pytest.approx(2)
    assert row.clear_removed == 0  # clear: rings 0 and 1, at t = 1/2 their power is the ratio
    assert row.buried_passed == 0


def test_energies_of_the_soft_mask_by_brute_force() -> None:
    model, s = ForcingConfig(), law_spectrum(16, 9.0, 2.0)
    for t in (0.0, 0.4, 1.0):
        row = assess(s, model, FlowConfig(), np.array([t]))[0]
        m, power = masks(model, (16, 16), t)[0] ** 2, s.power()
        lost = kept = whole = 0.0
        for i in range(16):
            for j in range(16):
                p = power[int(np.hypot(i, j) + 0.5)] if i + j else 0.0
                lost += (1 - m[i, j]) * p
                whole += p
                kept += m[i, j] / 256
        assert row.signal_lost == pytest.approx(lost / whole)
        assert row.noise_removed == pytest.approx(1 - kept)


def test_training_time_follows_the_logit_normal() -> None:
    flow = FlowConfig(P_mean=-0.4, P_std=0.9)
    t = np.array(training_times(mx.array(np.random.default_rng(0).standard_normal(100_000)), flow))
    edges = np.linspace(0, 1, 11)
    share = training_share(edges[:-1], edges[1:], flow)
    assert share.sum() == pytest.approx(1)
    assert share == pytest.approx(np.histogram(t, edges)[0] / len(t), abs=0.005)
    rows = assess(law_spectrum(16, 9.0, 2.0), ForcingConfig(), flow)
    assert sum(r.training for r in rows) == pytest.approx(1)
    assert training_share(edges[:-1], edges[1:], FlowConfig(P_std=0)).tolist() == [0, 0, 0, 1, 0, 0, 0, 0, 0, 0]


# ---- schedules and verdicts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sigma", "delta"), [(1.0, 1.0), (2.0, 1.0), (1.0, 0.1)])
def test_the_data_schedule_lies_where_the_ratio_is_delta(sigma: float, delta: float) -> None:
    s = law_spectrum(64, 40.0, 2.4)
    c = np.array(data_schedule(s, sigma, delta))
    t = np.linspace(0, 1, len(c))
    assert c[0] == 0
    assert c[-1] == 1
    assert np.all(np.diff(c) >= 0)
    k = c / s.rings.fraction(1.0)
    inside = (k > 1) & (k < s.k[-1] - 0.01)
    assert inside.sum() > 20
    at = [data_to_noise(40.0 * k[[i]] ** -2.4, t[[i]], sigma)[0, 0] for i in np.flatnonzero(inside)]
    assert at == pytest.approx(np.full(len(at), delta), rel=1e-3)
    model = ForcingConfig(scale_schedule="data", schedule_cutoffs=tuple(c))
    assert judge(assess(s, model, FlowConfig(noise_scale=sigma))).shares["harmful"] == 0


def test_no_band_that_stands_out_lies_above_a_data_schedule_also_with_bumps() -> None:
    rng = np.random.default_rng(3)
    k = np.maximum(Rings(64).k, 1)
    power = 30.0 * k**-2.0 * np.exp(rng.standard_normal(len(k)))
    c, t = np.array(schedule_of(Rings(64), power, 1.0)), np.linspace(0, 1, 101)
    assert np.all(np.diff(c) >= 0)
    clear = data_to_noise(power, t, 1.0)[1:-1] > 1.0001
    assert not (clear & (Rings(64).fraction(k) > c[1:-1, None] + 1e-5))[:, 1:].any()


@pytest.mark.parametrize(("delta", "sigma"), [(0.0, 1.0), (-1.0, 1.0), (float("nan"), 1.0), (1.0, 0.0)])
def test_a_data_schedule_needs_positive_numbers(delta: float, sigma: float) -> None:
    with pytest.raises(MlxSfError, match="want a number above 0"):
        data_schedule(law_spectrum(16, 9, 2), sigma, delta)


def test_verdicts() -> None:
    """Photograph-like data (alpha 2): right at 256, timid at 512 with noise 2. Fine detail everywhere: harmful."""
    linear, flow = ForcingConfig(), FlowConfig(noise_scale=1.0)
    photographs = judge(assess(law_spectrum(256, 800, 2.0), linear, flow))
    assert photographs.judgement == "right"
    assert photographs.shares["harmful"] == 0
    # the same pictures twice as large: four times the power at the same k
    larger = assess(law_spectrum(512, 3200, 2.0), ForcingConfig(), FlowConfig(noise_scale=2.0))
    assert judge(larger).judgement == "too timid"
    detailed = judge(assess(known(256, np.full(362, 20.0)), linear, flow))
    assert detailed.judgement == "harmful"
    assert any("as noise are cut" in line for line in detailed.lines)
    own = data_schedule(law_spectrum(256, 800, 2.0), 1.0)
    fitted = ForcingConfig(scale_schedule="data", schedule_cutoffs=own)
    assert judge(assess(law_spectrum(256, 800, 2.0), fitted, flow)).judgement == "bold"
    fainter = data_schedule(law_spectrum(256, 800, 2.0), 1.0, delta=0.01)
    fitted = ForcingConfig(scale_schedule="data", schedule_cutoffs=fainter)
    assert judge(assess(law_spectrum(256, 800, 2.0), fitted, flow)).shares["right"] > 0.99
    assert sum(photographs.shares.values()) == pytest.approx(1)


# ---- bad input -------------------------------------------------------------------------------------------------


def _folder(path: Path, count: int, side: int, constant: bool = False) -> Path:
    rng = np.random.default_rng(0)
    path.mkdir()
    for i in range(count):
        picture = np.full((side, side, 3), i) if constant else rng.integers(0, 256, (side, side, 3))
        Image.fromarray(picture.astype(np.uint8)).save(path / f"{i:03d}.png")
    return path


def test_refusals_are_one_line(tmp_path: Path, refused) -> None:
    out = ("-o", tmp_path / "out")
    few = _folder(tmp_path / "few", 5, 32)
    refused("5 picture(s) to measure, want at least 8", "spectrum", few, "--img-size", 32, *out)
    refused("want at least 8", "spectrum", "-n", 3, "--img-size", 32, *out)
    flat = _folder(tmp_path / "flat", 10, 32, constant=True)
    refused("all 10 images are constant", "spectrum", flat, "--img-size", 32, *out)
    small = _folder(tmp_path / "small", 10, 32)
    line = refused("10 of 10 pictures looked at are smaller than 64 pixels", "spectrum", small, "--img-size", 64, *out)
    assert "--img-size 32" in line
    refused("no such folder", "spectrum", tmp_path / "none", *out)
    refused("want at least 6 for a fit", "spectrum", small, "--img-size", 8, *out)
    refused("fit range is 9 to 4", "spectrum", small, "--img-size", 32, "--fit-range", 9, 4, *out)
    refused("give --ckpt", "spectrum", small, "--capacity", *out)
    refused("--noise-scale is -1", "spectrum", small, "--img-size", 32, "--noise-scale", -1, *out)
    refused("delta is 0", "spectrum", small, "--img-size", 32, "--delta", 0, *out)
    for schedule in ("sine", "power", "power:x", "linear:2"):
        refused(schedule, "spectrum", small, "--schedule", schedule, *out)
    assert not list((tmp_path / "out").iterdir())


def test_a_few_small_pictures_are_allowed_and_said(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "mixed", 40, 32)
    Image.new("RGB", (20, 50)).save(folder / "small.png")
    (folder / "torn.png").write_bytes((folder / "000.png").read_bytes()[:20])
    assert "1 of 41 pictures looked at are smaller than 32 pixels (down to 20)" in (
        check_sizes(FolderSource(folder, (32, 32))) or ""
    )
    assert check_sizes(FolderSource(folder, (20, 20))) is None
    assert check_sizes(SceneSource((32, 32))) is None


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(MlxSfError, match=r"want \(N, 3, 16, 16\)"):
        Meter(16).add(np.zeros((2, 3, 8, 8)))
    with pytest.raises(MlxSfError, match="want a divisor"):
        Meter(16, 5)


# ---- the command -----------------------------------------------------------------------------------------------


def test_the_command_writes_what_it_says(tmp_path: Path, cli) -> None:
    out, cutoffs = tmp_path / "out", tmp_path / "cutoffs.json"
    status, text, err = cli(
        "spectrum", "-n", 48, "--img-size", 32, "--schedule", "cosine", "--schedule", "data:0.5",
        "--noise-scale", 2, "--delta", 0.5, "--schedule-out", cutoffs, "-o", out,
    )  # fmt: skip
    assert status == 0, err
    assert "alpha (95 % interval)" in text
    assert text.count("verdict:") == 2
    record = json.loads((out / "spectrum.json").read_text())
    assert (record["images"], record["noise_scale"]) == (48, 2)
    assert list(record["schedules"]) == ["cosine", "data, δ = 0.5"]
    assert len(record["power"]["luminance"]) == len(record["k"])
    for name in ("spectrum.png", "schedules.png"):
        with Image.open(out / name) as picture:
            assert picture.width > 800
    radii = read_cutoffs(str(cutoffs))
    assert (radii[0], radii[-1]) == (0, 1)
    ForcingConfig(scale_schedule="data", schedule_cutoffs=radii)
    status, text, err = cli(
        "train", "--size", "nano", "--patch", 8, "--scale-schedule", "data", "--schedule-cutoffs", cutoffs, "--dry-run",
        "--output", tmp_path,
    )  # fmt: skip
    assert status == 0, err


def test_streams_and_data_sets_are_measured_like_folders(tmp_path: Path, cli) -> None:
    import datasets

    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(20)]
    data = datasets.Dataset.from_dict({"image": images}, features=datasets.Features({"image": datasets.Image()}))
    data.save_to_disk(str(tmp_path / "set"))
    powers = []
    for flags in ((), ("--streaming", "-n", 20)):
        out = tmp_path / f"out{len(flags)}"
        status, _, err = cli("spectrum", tmp_path / "set", "--img-size", 16, "-o", out, *flags)
        assert status == 0, err
        powers.append(json.loads((out / "spectrum.json").read_text())["power"]["mean"])
    assert powers[0] == pytest.approx(powers[1], rel=1e-4)
    status, _, err = cli("spectrum", tmp_path / "set", "--img-size", 32, "--streaming", "-n", 20, "-o", tmp_path / "x")
    assert status == 1
    assert "smaller than 32 pixels" in err
