"""The operations in Triton: the same names and the same contracts as in csrc. Imported as ``gradproj.triton_kernels``."""
