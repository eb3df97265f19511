"""Emulated arm64 cores: artifacts run on the kernels that a phone's processor would run.

A root folder of Debian's arm64 Python with the aarch64 wheels of the runtimes is set up once
(`setup`), and qemu runs our worker in it as one of the cores of `cores.CORES`.
"""
