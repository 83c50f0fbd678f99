"""The operations in Triton: the same names and the same contracts as in csrc. Imported as ``gradproj.triton_kernels``.

One file per operation, its kernels above its launch. Shared on the host: ``op`` registers and launches, ``table`` and
``pin_table`` build the tables that kernels walk, ``cache`` keeps them on the device. Shared on the device: ``walk``;
``tile`` is the pin's.
"""

from gradproj.triton_kernels import combine, gram, pin, project, weights  # noqa: F401  each registers its op
