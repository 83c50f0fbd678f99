"""The operations in Triton: the same names and the same contracts as in csrc. Imported as ``gradproj.triton_kernels``.

A file per operation, with its kernels above their launch. What they share on the host: ``op`` registers and starts,
``table`` and ``pin_table`` lay out what a kernel walks, ``cache`` keeps it on the device; on the device: ``walk``.
"""

from gradproj.triton_kernels import combine, gram, pin, project, weights  # noqa: F401  each registers its op
