"""For Hugging Face's models and trainers: ``gradproj.hf.Protect``, a callback, and ``gradproj.hf.own_text``.

See :mod:`gradproj.integrations.hf` and :mod:`gradproj.integrations.own_text`.
"""

from gradproj.integrations.hf import ProtectCallback as Protect
from gradproj.integrations.own_text import own_text

__all__ = ["Protect", "own_text"]
