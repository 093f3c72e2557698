"""Rounding that looks at activations: better codes and scales of the same format, from a calibration text."""
