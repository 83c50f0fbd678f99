"""What the arithmetic over the machine code promises of each row of the GPU gate, by device; NOTES.md has the sums.

A share is of the minimal bytes at the bandwidth of a copy in device memory; what L2 holds goes beyond it. Stated for an
H100 and carried over to other devices by what bounds a row. A device that is not listed gets no prediction.
"""

from typing import NamedTuple


class Gpu(NamedTuple):
    copy: float  # bytes a second that a copy reads and writes
    l2: float  # bytes of its L2 cache
    sms: int  # its multiprocessors: the bandwidth of L2, tensor cores and the rate of instructions depend on them


H100 = Gpu(3.0e12, 50e6, 132)  # nine tenths of the 3.35 TB/s of its memory
GPUS = {"NVIDIA H100 80GB HBM3": H100, "NVIDIA H200": Gpu(4.3e12, 60e6, 132)}  # as the driver names them


class Prediction(NamedTuple):
    """From ``low`` to ``high`` on an H100.

    ``bound``: "memory", beside which launches and tails take as long on every device; "L2", which falls
    short of memory as that gets faster, and of which there is more where L2 is larger; "host": depends on neither.
    """

    low: float
    high: float
    bound: str = "memory"
    quantity: str = "share_of_limit"  # the field of the row
    moved: float = 1.0  # bytes of device memory that are moved, over the minimal ones

    def on(self, gpu: Gpu) -> tuple[float, float]:
        faster = gpu.copy / H100.copy
        chip = gpu.sms / H100.sms / faster
        if self.bound == "memory":
            return over(self.low * self.moved, faster) / self.moved, over(self.high * self.moved, faster) / self.moved
        if self.bound == "L2":
            return self.low * chip, self.high * gpu.l2 / H100.l2
        return self.low, self.high


def over(share: float, faster: float) -> float:
    """The share where memory is ``faster``, and what a call takes beyond its bytes stays."""
    return 1 / (1 + (1 / share - 1) * faster)


OF_PROJECTIONS = {  # the CUDA kernels
    "124M fp32": Prediction(0.93, 0.98),
    "124M bf16": Prediction(0.92, 0.97),
    "10M fp32": Prediction(1.30, 1.50, "L2"),
    "10M bf16": Prediction(1.20, 1.80, "L2"),
    "300 x 64": Prediction(75e-6, 230e-6, "host", "seconds"),
    "600 x 64": Prediction(75e-6, 230e-6, "host", "seconds"),
    "300 x 64, captured": Prediction(7.5e-6, 12e-6, "host", "seconds"),
    "600 x 64, captured": Prediction(7.5e-6, 12e-6, "host", "seconds"),
    "K = 8 fp32": Prediction(0.85, 0.92),
    "K = 8 bf16": Prediction(0.75, 0.85),
    "K = 32 fp32, Gram known": Prediction(0.85, 0.90),
    "K = 32 fp32": Prediction(0.19, 0.21, moved=298 / 67),  # 264 N of the Gram, 34 N of combine
    "parts fp32": Prediction(0.75, 0.85),
    "1B fp32": Prediction(0.95, 0.98),
    "1B bf16": Prediction(0.94, 0.97),
}
PREDICTED = {"cuda": OF_PROJECTIONS}  # by backend; of Triton's pins see pin_model.py
