"""A page to play with, in the browser: draw, watch the forcing, compare, follow a run, read evaluations.

`page.py` builds it of its tabs, one file each. Drawing goes on in a process of its own (`worker.py`, `device.py`), so
that a crash in there is a message. `safety.py` holds what keeps the page to itself.

Gradio is imported by this room alone, and only when `mlx-sf app` runs.
"""
