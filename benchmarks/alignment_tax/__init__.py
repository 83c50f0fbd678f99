"""The alignment-tax laboratory: what aligning a small language model costs it, under every cure, measured side by side.

Data flows one way: settings -> data -> base -> adapt -> measure -> runs -> store -> report -> (figure, page).
"""
