"""What the machine does best: defaults of every device; what a Linux CPU needs (blas, malloc, lanes, elementwise)."""
