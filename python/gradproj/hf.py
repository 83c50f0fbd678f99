"""``gradproj.hf.Protect``: for Hugging Face's trainers. See :mod:`gradproj.integrations.hf`."""

from gradproj.integrations.hf import ProtectCallback as Protect

__all__ = ["Protect"]
