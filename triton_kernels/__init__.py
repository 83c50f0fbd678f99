"""The operations in Triton: the same names and the same contracts as in csrc. Imported as ``gradproj.triton_kernels``.

A file per operation, with its kernel above its launch; ``table`` and ``walk`` are what they share, on the host and on the device.
"""

from gradproj.triton_kernels import combine, gram, project, weights  # noqa: F401  each registers its op
