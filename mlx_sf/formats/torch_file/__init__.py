"""The parts of `mlx_sf.torch_file`: names -> unpickle, storage -> tensors."""
