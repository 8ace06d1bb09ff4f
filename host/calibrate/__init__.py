"""The Calibrate node."""
