"""A fixed feature set for a Fréchet distance without a downloaded network: filters at random, drawn once and for all.

A picture becomes 64 numbers: how strongly it answers to 52 random 3x3 colour filters of zero mean, at three scales
(what texture there is, and how much), and its 2x2 thumbnail (layout and colour). Random filters of this size see every
orientation and every frequency up to Nyquist, unlike the FID Inception, which enlarges small pictures to 299 pixels.
"""

import numpy as np

_FILTERS = (20, 20, 12)  # at full size, half and a quarter
_SIDE = 3
DIMENSIONS = sum(_FILTERS) + 12


def _halved(x: np.ndarray) -> np.ndarray:
    """(B, C, n, n) -> (B, C, n/2, n/2), the mean of each 2x2 block."""
    return (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]) / 4


class RandomFeatures:
    """features(pictures (B, n, n, 3) uint8, n a multiple of 4, at least 12) -> (B, 64) float64.

    The filters are the same at every size and on every machine. Not a perceptual distance: it ranks sets of one kind of
    picture by the statistics of their textures and colours.
    """

    def __init__(self) -> None:
        rng = np.random.default_rng(20_240_701)
        self.filters = []
        for count in _FILTERS:
            f = rng.standard_normal((count, 3 * _SIDE * _SIDE))
            f -= f.mean(axis=1, keepdims=True)
            self.filters.append((f / np.linalg.norm(f, axis=1, keepdims=True)).astype(np.float32))

    def __call__(self, pictures: np.ndarray, chunk: int = 250) -> np.ndarray:
        return np.concatenate([self._features(pictures[i : i + chunk]) for i in range(0, len(pictures), chunk)])

    def _features(self, pictures: np.ndarray) -> np.ndarray:
        x = np.moveaxis(pictures, 3, 1).astype(np.float32) / np.float32(127.5) - 1
        out = [x]
        while out[0].shape[-1] > 2 and out[0].shape[-1] % 2 == 0:
            out[0] = _halved(out[0])
        size = out[0].shape[-1] // 2  # a side that is not a power of two ends at an odd size: cut in four
        blocks = [
            out[0][:, :, i, j]
            for i in (slice(0, size), slice(-size, None))
            for j in (slice(0, size), slice(-size, None))
        ]
        columns = [b.mean(axis=(2, 3)) for b in blocks]
        for filters in self.filters:
            windows = np.lib.stride_tricks.sliding_window_view(x, (_SIDE, _SIDE), axis=(2, 3))  # (B, 3, h, w, 3, 3)
            rows = windows.transpose(0, 2, 3, 1, 4, 5).reshape(-1, 3 * _SIDE * _SIDE)
            answers = np.maximum(rows @ filters.T, 0).reshape(len(x), -1, len(filters))
            columns.append(answers.mean(axis=1))
            x = _halved(x)
        return np.concatenate(columns, axis=1).astype(np.float64)
