"""Stands in for the CUDA libraries that torch names but that an engine on a CPU never calls.

``stand_in_libraries.py LIBRARY...`` takes the shared libraries that importing torch loads, and
walks through all that they load in turn. For each one that is found neither beside them nor on
their search path nor in the system, it makes one with that name in their folder. It defines each
symbol that they need and that nothing else defines, with the version under which they need it; a
call to one ends the process. It needs ``gcc`` and ``readelf``.
"""

import collections
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import Dict, List, NamedTuple, Optional, Set

# Line kinds of `readelf --dynamic --dyn-syms --version-info --wide`.
NEEDED = re.compile(r"\(NEEDED\)\s+Shared library: \[(.+)\]")
SEARCH_PATH = re.compile(r"\((?:RPATH|RUNPATH)\)\s+Library (?:rpath|runpath): \[(.+)\]")
VERSIONS_OF = re.compile(r"Version: \d+\s+File: (\S+)\s+Cnt: \d+")
VERSION = re.compile(r"Name: (\S+)\s+Flags: .*Version: \d+")
SYMBOL = re.compile(
    r"^\s*\d+: \w+\s+\S+\s+\w+\s+(?P<bind>\w+)\s+\w+\s+(?:\[.*\]\s+)?(?P<at>\w+)\s+(?P<name>\S+)"
)


class Symbol(NamedTuple):
    name: str
    version: Optional[str]


class Library:
    """What a shared library needs and gives."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.needed: List[str] = []
        self.search: List[pathlib.Path] = []
        # Which library each needed version belongs to.
        self.version_of: Dict[str, str] = {}
        self.undefined: Set[Symbol] = set()
        self.defined: Set[str] = set()
        command = ["readelf", "--dynamic", "--dyn-syms", "--version-info", "--wide", str(path)]
        origin = None
        for line in subprocess.run(
            command, check=True, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"}
        ).stdout.splitlines():
            if found := NEEDED.search(line):
                self.needed.append(found[1])
            elif found := SEARCH_PATH.search(line):
                for folder in found[1].split(":"):
                    self.search.append(pathlib.Path(folder.replace("$ORIGIN", str(path.parent))))
            elif found := VERSIONS_OF.search(line):
                origin = found[1]
            elif origin and (found := VERSION.search(line)):
                self.version_of[found[1]] = origin
            elif found := SYMBOL.match(line):
                self._symbol(found)

    def _symbol(self, found: "re.Match[str]") -> None:
        name, _, version = found["name"].replace("@@", "@").partition("@")
        if found["at"] != "UND":
            self.defined.add(name)
        elif found["bind"] == "GLOBAL":
            self.undefined.add(Symbol(name, version or None))


def system_library(name: str) -> Optional[pathlib.Path]:
    """Where the system has this library, if it does."""
    said = subprocess.run(
        ["gcc", f"-print-file-name={name}"], check=True, capture_output=True, text=True
    ).stdout.strip()
    # The name comes back as it was when there is none.
    return pathlib.Path(said) if os.path.isabs(said) and os.path.exists(said) else None


def stand_ins(roots: List[pathlib.Path]) -> Dict[str, Set[Symbol]]:
    """Which libraries are missing, and the symbols that each has to define."""
    loaded: Dict[str, Library] = {}
    defined: Set[str] = set()
    missing: Dict[str, Set[Symbol]] = {}
    waiting = collections.deque(roots)
    while waiting:
        library = Library(waiting.popleft())
        loaded[library.path.name] = library
        defined |= library.defined
        for name in library.needed:
            if name in loaded or name in missing or any(path.name == name for path in waiting):
                continue
            folders = [library.path.parent, *library.search]
            found = next((folder / name for folder in folders if (folder / name).exists()), None)
            if found is not None:
                waiting.append(found)
            elif (path := system_library(name)) is not None:
                # What a system library needs is the system's affair.
                defined |= Library(path).defined
            else:
                missing[name] = set()
    for library in loaded.values():
        gone = [name for name in library.needed if name in missing]
        for symbol in library.undefined:
            if symbol.name in defined or not gone:
                continue
            # Symbols without a version say nothing of their library: any of the missing ones does.
            owner = library.version_of.get(symbol.version or "", gone[0])
            if owner in missing:
                missing[owner].add(symbol)
    return missing


def build(name: str, symbols: Set[Symbol], folder: pathlib.Path) -> None:
    """Makes one stand-in, complete or not at all."""
    by_version: Dict[Optional[str], List[str]] = collections.defaultdict(list)
    for symbol in sorted(symbols, key=lambda symbol: (symbol.version or "", symbol.name)):
        by_version[symbol.version].append(symbol.name)
    names = sorted({symbol.name for symbol in symbols})
    source = "".join(f"void {symbol}(void) {{ __builtin_trap(); }}\n" for symbol in names)
    script = "".join(
        f"{version} {{ global: {'; '.join(listed)}; }};\n"
        for version, listed in by_version.items()
        if version is not None
    )
    with tempfile.TemporaryDirectory() as scratch:
        versions = pathlib.Path(scratch) / "versions.map"
        versions.write_text(script, encoding="utf-8")
        made = folder / f".{name}.{os.getpid()}"
        command = ["gcc", "-shared", "-fPIC", "-w", "-fno-builtin", f"-Wl,-soname,{name}"]
        if script:
            command.append(f"-Wl,--version-script={versions}")
        command += ["-o", str(made), "-x", "c", "-"]
        subprocess.run(command, input=source, text=True, check=True)
        os.replace(made, folder / name)


def main(paths: List[str]) -> None:
    roots = [pathlib.Path(path).resolve() for path in paths]
    if not roots:
        raise SystemExit("name the libraries that torch loads first")
    for name, symbols in sorted(stand_ins(roots).items()):
        build(name, symbols, roots[0].parent)
        print(f"{name}: stands in for {len(symbols)} symbols")


if __name__ == "__main__":
    main(sys.argv[1:])
