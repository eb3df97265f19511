"""The cores that are emulated, each with the ``/proc/cpuinfo`` and ``/sys`` that belong to it.

Programs choose their kernels by what these say, and qemu runs only what the core has: where the two
disagree, a program dies of an illegal instruction.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

# As qemu 10 states them for each core.
_V82: Final = (
    "fp asimd aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"
)
_V9: Final = (
    "fp asimd aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm jscvt fcma lrcpc dcpop "
    "sha3 sm3 sm4 asimddp sha512 sve asimdfhm dit uscat ilrcpc flagm sb paca pacg dcpodp sve2 "
    "sveaes svepmull svebitperm svesha3 svesm4 flagm2 frint svei8mm svebf16 i8mm bf16 bti mte"
)
_ALL: Final = (
    "fp asimd aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm jscvt fcma lrcpc dcpop "
    "sha3 sm3 sm4 asimddp sha512 sve asimdfhm dit uscat ilrcpc flagm sb paca pacg dcpodp sve2 "
    "sveaes svepmull svebitperm svesha3 svesm4 flagm2 frint svei8mm svef32mm svef64mm svebf16 i8mm "
    "bf16 rng bti mte"
)
# An Armv9 core with 128-bit vectors and no matrix unit of its own.
_V9_OF_QEMU_7: Final = "max,sme=off,sve128=on,sve256=off,sve512=off,sve1024=off,sve2048=off"


@dataclass(frozen=True)
class Core:
    """A core that qemu emulates.

    Attributes:
        name: as a device's name has it, and as qemu's ``-cpu`` takes it.
        counted_as: what ``-cpu`` of the older qemu that counts instructions takes: a core with the
            same features as far as that has one, under this core's ``/proc/cpuinfo``.
        architecture: the revision of the architecture, for people.
        features: of ``/proc/cpuinfo``.
        implementer: who made it; 0x41 is Arm.
        part: the implementer's number of the core.
        revision: of the core, such as (2, 0) for r2p0.
        kernels: what runtimes can choose there, for people.
        phones: phones and chips that have it, for people; empty where none has.
    """

    name: str
    counted_as: str
    architecture: str
    features: str
    implementer: int
    part: int
    revision: tuple[int, int]
    kernels: str
    phones: str

    @property
    def is_real(self) -> bool:
        """Whether a phone has such a core."""
        return bool(self.phones)

    @property
    def midr(self) -> int:
        """The register that names the core, as the kernel shows it below ``/sys``."""
        variant, revision = self.revision
        return self.implementer << 24 | variant << 20 | 0xF << 16 | self.part << 4 | revision

    def cpuinfo(self, processors: int) -> str:
        """The text of ``/proc/cpuinfo``."""
        one = (
            "processor\t: {number}\nBogoMIPS\t: 100.00\n"
            f"Features\t: {self.features}\nCPU implementer\t: {self.implementer:#04x}\n"
            f"CPU architecture: 8\nCPU variant\t: {self.revision[0]:#x}\n"
            f"CPU part\t: {self.part:#05x}\nCPU revision\t: {self.revision[1]}\n\n"
        )
        return "".join(one.format(number=number) for number in range(processors))


CORES: dict[str, Core] = {
    core.name: core
    for core in (
        Core(
            "cortex-a55", "cortex-a76", "Armv8.2-A", _V82, 0x41, 0xD05, (2, 0), "dot product",
            "the small cores of phones of 2018 to 2022",
        ),
        Core(
            "cortex-a76", "cortex-a76", "Armv8.2-A", _V82, 0x41, 0xD0B, (4, 1), "dot product",
            "the big cores of the Snapdragon 855 and the Kirin 980",
        ),
        Core(
            "cortex-a710", _V9_OF_QEMU_7, "Armv9-A", _V9, 0x41, 0xD47, (2, 1),
            "dot product, i8mm, bf16, SVE2",
            "the middle cores of the Snapdragon 8 Gen 1 and the Dimensity 9000",
        ),
        Core(
            "max", "max", "all that qemu has", _ALL, 0x00, 0x051, (0, 0),
            "dot product, i8mm, bf16, SVE2, SME", "",
        ),
    )
}  # fmt: skip


def write_core(core: Core, folder: Path, processors: int) -> None:
    """Writes the files of ``/proc`` and ``/sys`` that tell programs which core they run on.

    Args:
        core: the core.
        folder: takes ``proc`` and ``sys``.
        processors: how many of them there are.
    """
    (folder / "proc").mkdir(parents=True, exist_ok=True)
    (folder / "proc/cpuinfo").write_text(core.cpuinfo(processors), encoding="ascii")
    cpus = folder / "sys/devices/system/cpu"
    cpus.mkdir(parents=True, exist_ok=True)
    numbers = f"0-{processors - 1}\n" if processors > 1 else "0\n"
    for name in ("online", "possible", "present"):
        (cpus / name).write_text(numbers, encoding="ascii")
    (cpus / "kernel_max").write_text(f"{processors - 1}\n", encoding="ascii")
    for number in range(processors):
        registers = cpus / f"cpu{number}/regs/identification"
        registers.mkdir(parents=True, exist_ok=True)
        (registers / "midr_el1").write_text(f"{core.midr:#018x}\n", encoding="ascii")
        topology = cpus / f"cpu{number}/topology"
        topology.mkdir(parents=True, exist_ok=True)
        (topology / "core_id").write_text(f"{number}\n", encoding="ascii")
        (topology / "physical_package_id").write_text("0\n", encoding="ascii")
        (topology / "core_siblings_list").write_text(numbers, encoding="ascii")
        (topology / "thread_siblings_list").write_text(f"{number}\n", encoding="ascii")
