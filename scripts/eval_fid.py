#!/usr/bin/env python3
"""The same as `mlx-sf eval`, as a script for `mlx.launch`:

mlx.launch -n 2 scripts/eval_fid.py --ckpt model.npz --ref in256_stats.npz --num-images 50000

(`mlx.launch` takes `-n` for itself wherever it stands: write `--num-images` in full.)
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mlx_sf.cli import main

if __name__ == "__main__":
    main(["eval", *sys.argv[1:]])
