"""The mathematics of 4-bit linear layers: rotation, smoothing, low-rank branch, rounding, files. No host."""
