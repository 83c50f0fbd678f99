"""A real language model, taught something narrow under cures of the alignment tax: `make real`.

settings -> runs (data, model, adapt) -> report. Every finished run is kept.
"""
