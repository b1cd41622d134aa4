"""What a data set's spectrum says about Spectral Forcing, and where a network's capacity goes.

`measure` a source, `fit_power_law`, `assess` and `judge` a schedule, make one with `data_schedule`;
`measure_capacity` of a network. `mlx-sf spectrum` prints and draws it all.
"""

from .capacity import Capacity, measure_capacity
from .meter import Meter, Spectrum, measure
from .power_law import PowerLaw, fit_power_law
from .ratio import contour, data_schedule, data_to_noise
from .verdict import assess, judge

__all__ = [
    "Capacity",
    "Meter",
    "PowerLaw",
    "Spectrum",
    "assess",
    "contour",
    "data_schedule",
    "data_to_noise",
    "fit_power_law",
    "judge",
    "measure",
    "measure_capacity",
]
