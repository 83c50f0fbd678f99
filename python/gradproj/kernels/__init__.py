"""The ops: their schemas, what may be passed, the backends that implement them, and the one in plain torch.

They know buffers and numbers, not ranks, protections or optimizers. Imports nothing else of the package.
"""
