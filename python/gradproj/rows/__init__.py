"""Lists of tensors, possibly sharded: the stateless functions on them, and what other ranks hold of them.

A row never becomes one flat tensor. Imports :mod:`gradproj.kernels`.
"""
