"""PTX, as nvcc writes it, to C++ that runs on the simulated machine of ``runtime/``.

``parser`` reads the text into statements, ``instructions`` holds one entry per opcode, ``translator`` writes the C++.
"""

from tests.cuda_on_cpu.ptx.instructions import UnsupportedInstruction
from tests.cuda_on_cpu.ptx.parser import parse
from tests.cuda_on_cpu.ptx.translator import translate

__all__ = ["UnsupportedInstruction", "parse", "translate"]
