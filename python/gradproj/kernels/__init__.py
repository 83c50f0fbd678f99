"""The ops: their schemas, what may be passed, the backends that implement them, and the one in plain torch.

They know buffers and numbers, and nothing of rows over ranks, protections or optimizers. Imports nothing of the
package.
"""
