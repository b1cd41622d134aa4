"""File formats that know nothing of networks: tensor containers, PyTorch files, PNG."""
