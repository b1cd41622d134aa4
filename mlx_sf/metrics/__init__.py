"""FID, Inception Score, KID, precision/recall and spectral distance, without torch."""
