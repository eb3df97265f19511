"""Brings llama.cpp's source of ggml: it lies in the source package of llama-cpp-python."""

import hashlib
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

PART: Final = "vendor/llama.cpp/ggml/"


@dataclass(frozen=True)
class SourcePackage:
    """A source package that pip downloads.

    Attributes:
        name: of the package.
        version: of the package.
        sha256: of its file.
    """

    name: str
    version: str
    sha256: str

    def folder(self, where: Path) -> Path:
        """Returns the folder of ggml's source, downloading it if it is not there.

        Args:
            where: folder in which it is kept.

        Raises:
            SystemExit: pip cannot download it, or the file is another one.
        """
        made = where / f"ggml-{self.version}"
        if made.is_dir():
            return made
        where.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=where) as scratch:
            file = self._download(Path(scratch))
            with file.open("rb") as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()
            if found != self.sha256:
                raise SystemExit(
                    f"{file.name} is not what this script knows: SHA-256 {found}, not {self.sha256}"
                )
            partial = Path(scratch) / "ggml"
            _extract(file, partial)
            partial.rename(made)
        return made

    def _download(self, scratch: Path) -> Path:
        wanted = f"{self.name}=={self.version}"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--no-binary", self.name, "--dest", str(scratch), wanted]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(
                f"pip could not download {wanted}, which holds ggml's source: "
                f"{done.stderr.strip().splitlines()[-1:]}; leave llama.cpp out with "
                f"--skip llama.cpp"
            )
        return next(scratch.glob("*.tar.gz"))


GGML_SOURCE: Final = SourcePackage(
    "llama-cpp-python",
    "0.3.36",
    "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e",
)


def _extract(file: Path, folder: Path) -> None:
    """Unpacks the files of ggml into a folder, without the folders above them."""
    with tarfile.open(file) as package:
        for member in package:
            _, found, inside = member.name.partition(PART)
            if found and member.isfile() and inside:
                target = folder / inside
                target.parent.mkdir(parents=True, exist_ok=True)
                source = package.extractfile(member)
                assert source is not None
                target.write_bytes(source.read())
