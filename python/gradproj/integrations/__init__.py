"""One small file for each framework that owns the training loop.

They attach a protection to the optimizer that the framework has made. Imports :mod:`gradproj.optim`,
:mod:`gradproj.hooks`, :mod:`gradproj.protection`, :mod:`gradproj.capture`, and of :mod:`gradproj.nullspace` and
:mod:`gradproj.rows` what they hand on.
"""
