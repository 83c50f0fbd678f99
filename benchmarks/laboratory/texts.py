"""The texts that every Python brings along: the source of its library, and the English of its manual."""

import sysconfig
from pathlib import Path

CODE_FILES = [
    "argparse", "ast", "asyncio/base_events", "calendar", "collections/__init__", "configparser", "csv",
    "dataclasses", "datetime", "difflib", "doctest", "email/message", "enum", "fractions", "functools", "heapq",
    "inspect", "ipaddress", "json/decoder", "locale", "logging/__init__", "mailbox", "multiprocessing/pool",
    "optparse", "pathlib", "pickle", "pickletools", "platform", "plistlib", "random", "shutil", "smtplib", "socket",
    "statistics", "string", "subprocess", "tarfile", "tempfile", "textwrap", "threading", "tokenize", "traceback",
    "turtle", "typing", "unittest/case", "urllib/parse", "uuid", "warnings", "weakref", "zipfile",
]  # fmt: skip
CODE_HELD_OUT = ["_pydecimal", "gzip", "bdb", "cmd", "codecs", "contextlib", "copy", "fileinput", "imaplib", "ssl"]


def source(names: list[str]) -> str:
    """Of modules of the standard library."""
    folder = Path(sysconfig.get_path("stdlib"))
    # Python versions differ in which modules are packages: take what is there.
    files = [f for f in (folder / f"{name}.py" for name in names) if f.exists()]
    if not files:
        raise ValueError(
            f"{folder} holds no {names[0]}.py and none of the others: the text is Python's library as source; "
            "install it"
        )
    return "\n".join(f.read_text(encoding="utf-8") for f in files)


def manual() -> dict[str, str]:
    """The topics of Python's manual: English prose that comes with Python.

    Raises:
        ValueError: this Python came without it.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise ValueError(
            "this Python lacks the module pydoc_data.topics, which is the English prose here; "
            "install the whole standard library (on Debian: apt-get install libpython3-stdlib)"
        ) from None
    return topics
