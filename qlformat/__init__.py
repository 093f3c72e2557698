"""qlformat: NF4 + double-quantized checkpoints that every project can load."""

__version__ = "0.1.0"
