"""A FAKE of ``xcrun`` and ``devicectl``: devices, and one phone whose storage is a folder here.

It takes the commands that EdgeForge and coremltools 9 give, and no others.
"""

import json
import os
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent


def value(words: list[str], *names: str) -> str:
    """The value of an option, as ``--name value`` or ``--name=value``."""
    for at, word in enumerate(words):
        for name in names:
            if word == name:
                return words[at + 1]
            if word.startswith(f"{name}="):
                return word.partition("=")[2]
    raise SystemExit(f"fake devicectl misses {names[0]} in {words}")


def answer(words: list[str], result: object) -> None:
    file = value(words, "-j", "--json-output")
    Path(file).write_text(json.dumps({"info": {"version": "FAKE"}, "result": result}))


def main(words: list[str]) -> None:
    phone = Path(os.environ["FAKE_PHONE"])
    with (phone / "commands").open("a") as log:
        log.write(json.dumps(words) + "\n")
    if words[:1] == ["devicectl"]:
        words = words[1:]
    if words[:2] == ["list", "devices"]:
        listed = json.loads((HERE / "fake_devicectl_list.json").read_text())
        answer(words, listed["result"])
    elif words[:3] == ["device", "install", "app"]:
        bundle = os.environ.get("FAKE_BUNDLE", "com.coremltools.modelrunnerd")
        answer(words, {"installedApplications": [{"bundleID": bundle, "databaseUUID": "FAKE"}]})
    elif words[:3] == ["device", "process", "launch"]:
        import subprocess

        sys.exit(subprocess.call([sys.executable, str(HERE / "fake_modelrunner.py"), str(phone)]))
    elif words[:3] == ["device", "copy", "to"]:
        source, target = Path(value(words, "--source")), phone / value(words, "--destination")
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.parent / f".{target.name}"
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, partial)
        partial.rename(target)
        answer(words, {"source": str(source), "destination": str(target)})
    elif words[:3] == ["device", "copy", "from"]:
        source, target = phone / value(words, "--source"), Path(value(words, "--destination"))
        if not source.exists():
            sys.exit("FAKE: the file does not exist yet")
        shutil.copyfile(source, target)
        answer(words, {"source": str(source), "destination": str(target)})
    else:
        sys.exit(f"fake devicectl does not know {words}")


if __name__ == "__main__":
    main(sys.argv[1:])
