"""What machine code does in its loops, read from `cuobjdump -sass`."""

import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import NamedTuple

# What a mnemonic counts as. A drain waits until tensor cores have finished.
KINDS = {"BAR": "barriers", "STL": "spills", "LDL": "spills"}
MATRIX = ("HMMA", "HGMMA", "UTCHMMA")


class Instruction(NamedTuple):
    address: int
    text: str

    @property
    def kind(self) -> str:
        name = self.text.split(" ", 1)[0]
        if name.startswith("WARPGROUP.DEPBAR"):
            return "drains"
        name = name.split(".", 1)[0]
        return "matrix" if name in MATRIX else KINDS.get(name, "others")


def instructions(cuobjdump: Path, cubin: Path) -> list[Instruction]:
    text = subprocess.check_output([cuobjdump, "-sass", cubin], text=True, stderr=subprocess.DEVNULL)
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([^;]+);", text)
    return [Instruction(int(address, 16), operation) for address, operation in found]


def count(code: list[Instruction]) -> Counter:
    return Counter({"instructions": len(code)}) + Counter(i.kind for i in code)


def loops(code: list[Instruction]) -> list[Counter]:
    """The innermost loops that use tensor cores, in order: a branch backwards, and what lies between."""
    back = []
    for i in code:
        target = re.match(r"BRA\S*\s.*?(0x[0-9a-f]+)", i.text)
        if target and int(target[1], 16) < i.address:
            back.append((int(target[1], 16), i.address))
    inner = [(a, b) for a, b in back if not any((c, d) != (a, b) and a <= c and d <= b for c, d in back)]
    counts = [count([i for i in code if a <= i.address <= b]) for a, b in inner]
    return [c for c in counts if c["matrix"]]
