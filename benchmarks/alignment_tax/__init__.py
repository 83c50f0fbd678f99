"""The alignment-tax laboratory: what aligning a small language model costs it, under every cure, measured side by side.

Data flows one way: settings -> cures -> data -> base -> adapt -> measure -> runs -> store -> choose -> report -> (figure, page).
Some seeds choose each family's settings, others are reported.
"""
