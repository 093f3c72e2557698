"""One module a device: the kernels behind the torch operators of `qlformat.ops`, which registers them.

Each has the same three functions, whose arguments `ops` has checked: `dequantize`, `quantize`, `double_quantize`.
"""
