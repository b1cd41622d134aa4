"""Turn a PyTorch checkpoint into one self-describing file: the same as `mlx-sf convert`.

python convert/from_torch.py checkpoint-last.pth converted.npz
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a clone works without being installed

from mlx_sf.cli import main

if __name__ == "__main__":
    main(["convert", *sys.argv[1:]])
