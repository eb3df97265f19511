"""Instructions counted on emulated cores."""

from __future__ import annotations

import subprocess

import pytest

from device_harness.devices.arm64 import instructions
from device_harness.devices.arm64.instructions import CLASSES, build_plugin, count_instructions
from device_harness.errors import DeviceError, SetupError

# Each class's instructions as GNU as encodes them, in the order of the file below.
ENCODED = {
    "dot": (0x4E829420, 0x6E829420, 0x4F82E020),  # sdot, udot, sdot by element
    "i8mm": (0x4E82A420, 0x6E82A420, 0x4E82AC20, 0x4E829C20),  # smmla, ummla, usmmla, usdot
    "bf16": (0x6E42FC20, 0x6E42EC20),  # bfdot, bfmmla
    "fp16": (0x4E420C20, 0x4E421420),  # fmla, fadd, of eight halves
    "sve": (0x04A20020, 0x44820020),  # add, sdot, of z registers
    "memory": (0x3DC00020, 0xF9400020),  # ldr of q and of x
}


@pytest.fixture(scope="module")
def counted(arm64_root, artifact):
    """The same artifact on two cores, and once more on the first."""
    cores = ("cortex-a76", "cortex-a710")
    found = {core: count_instructions(artifact, 8, 4, core) for core in cores}
    return {**found, "again": count_instructions(artifact, 8, 4, "cortex-a76")}


def test_a_count_is_nearly_the_same_each_time(counted):
    one, other = counted["cortex-a76"], counted["again"]
    assert one.tokens == other.tokens
    for part in ("prefill", "decode"):
        first, second = getattr(one, part), getattr(other, part)
        assert first["dot"] == second["dot"] > 0
        assert abs(first["all"] / second["all"] - 1) < 0.02


def test_each_core_runs_its_own_kernels(counted):
    assert set(counted["cortex-a76"].prefill) == set(CLASSES)
    assert counted["cortex-a710"].prefill["i8mm"] > 0 == counted["cortex-a76"].prefill["i8mm"]


def test_without_kleidiai_the_count_differs(counted, artifact):
    without = count_instructions(artifact, 8, 4, "cortex-a76", {"kleidiai": "off"})
    assert without.runtime.endswith("without KleidiAI)")
    assert without.prefill["all"] != counted["cortex-a76"].prefill["all"]


def test_too_many_tokens_are_refused(arm64_root, artifact):
    with pytest.raises(DeviceError, match="holds 64 together: 60 \\+ 24 do not fit"):
        count_instructions(artifact, 60, 24)


@pytest.mark.parametrize("kind", ENCODED)
def test_the_plugin_knows_encodings(kind, tmp_path):
    """Classes by encodings of the assembler's, compiled into a program of their own."""
    words = ", ".join(f"{word:#x}" for word in ENCODED[kind])
    source = tmp_path / "classify.c"
    source.write_text(
        f'#include "{instructions._SOURCE}"\n#include <stdlib.h>\n'
        + "".join(
            f"{result} {name}{arguments} {{ abort(); }}\n" for result, name, arguments in _UNCALLED
        )
        + f"int main(void) {{ uint32_t words[] = {{{words}}};\n"
        f"for (unsigned at = 0; at < sizeof words / 4; at++) {{ uint64_t n[CLASSES] = {{0}};\n"
        f'classify(words[at], n); printf("%d", (int)n[{kind.upper()}]); }} return 0; }}\n'
    )
    program = tmp_path / "classify"
    subprocess.run(["cc", "-o", str(program), str(source)], check=True)
    assert subprocess.run([program], capture_output=True, text=True).stdout == "1" * len(
        ENCODED[kind]
    )


_UNCALLED = [
    ("void", "qemu_plugin_register_vcpu_tb_trans_cb", "(qemu_plugin_id_t a, translated b)"),
    ("void", "qemu_plugin_register_vcpu_syscall_cb", "(qemu_plugin_id_t a, called b)"),
    (
        "void",
        "qemu_plugin_register_vcpu_tb_exec_inline",
        "(struct qemu_plugin_tb *a, int b, void *c, uint64_t d)",
    ),
    ("size_t", "qemu_plugin_tb_n_insns", "(const struct qemu_plugin_tb *a)"),
    (
        "struct qemu_plugin_insn *",
        "qemu_plugin_tb_get_insn",
        "(const struct qemu_plugin_tb *a, size_t b)",
    ),
    ("const void *", "qemu_plugin_insn_data", "(const struct qemu_plugin_insn *a)"),
]


def test_without_a_compiler_it_is_told(place, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SetupError, match="there is none here: install gcc or clang"):
        build_plugin()


def test_a_compiler_that_fails_is_told(place, tmp_path, monkeypatch):
    (tmp_path / "cc").write_text("#!/bin/sh\necho no such thing >&2\nexit 1\n")
    (tmp_path / "cc").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SetupError, match="cannot build the plugin that counts: no such thing"):
        build_plugin()
    assert not [path for path in place.iterdir() if "instructions" in path.name]
