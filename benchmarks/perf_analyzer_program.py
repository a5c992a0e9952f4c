"""The perf_analyzer that ``make setup`` installs, and what it needs to start.

It is of the embedded server's release. Two libraries that it asks for are in that server's wheel, under other names.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from icportrait_client.errors import PortraitError

_BUNDLED = {"libb64.so.0d": "libb64-*.so.0d", "libcudart.so.12": "libcudart-*.so.12*"}
_PACKAGES = {
    "libb64.so.0d": "libb64-0d",
    "libcrypto.so.3": "libssl3",
    "libssl.so.3": "libssl3",
    "libstdc++.so.6": "libstdc++6",
    "libz.so.1": "zlib1g",
}
_UNSTABLE = 2
_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")


class PerfAnalyzerError(PortraitError):
    """perf_analyzer can't run here, or ended without figures."""


@dataclass(frozen=True)
class Program:
    """A perf_analyzer that starts here."""

    binary: str
    environment: dict[str, str]
    version: str

    def run(self, arguments: list[str], silence_s: float, echo: TextIO) -> list[str]:
        """Run the program to its end.

        Args:
            arguments: its command line.
            silence_s: it is ended where it prints nothing for so long.
            echo: gets what it prints, as it comes.

        Returns:
            The lines that it printed; also where its windows didn't agree.

        Raises:
            PerfAnalyzerError: it failed, as it does at the first call that fails, or fell silent.
        """
        lines: list[str] = []
        with subprocess.Popen(
            [self.binary, *arguments], env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            try:
                for line in _printed(process, silence_s):
                    print(line, end="", file=echo, flush=True)
                    lines.append(line.strip())
            except BaseException:
                process.kill()
                raise
        if process.returncode == -signal.SIGKILL:
            raise PerfAnalyzerError(
                f"perf_analyzer measured nothing for {silence_s:g} s; does the server still answer?"
            )
        if process.returncode not in (0, _UNSTABLE):
            reasons = [line for line in lines if "error" in line.lower()] or [line for line in lines if line][-1:]
            reason = reasons[0] if reasons else "no reason given"
            raise PerfAnalyzerError(f"perf_analyzer ended with status {process.returncode}: {reason}")
        return lines


def _printed(process: subprocess.Popen[str], silence_s: float) -> Iterator[str]:
    assert process.stdout is not None
    line = "not the end"
    while line:
        timer = threading.Timer(silence_s, process.kill)
        timer.start()
        try:
            line = process.stdout.readline()
        finally:
            timer.cancel()
        yield line


def find_program(links: Path) -> Program:
    """Find the perf_analyzer of ``make setup``, else the one on PATH.

    Args:
        links: a folder in which its libraries get the names that it asks for; they must last as long as it runs.

    Raises:
        PerfAnalyzerError: there is none, or it doesn't start; says what to install.
    """
    own = Path(sys.prefix) / "perf_analyzer" / "bin" / "perf_analyzer"
    binary = str(own) if own.is_file() else shutil.which("perf_analyzer")
    if binary is None:
        raise PerfAnalyzerError('perf_analyzer isn\'t installed; run "make setup"')
    wheel = Path(sysconfig.get_path("purelib")) / "nvidia_pytriton.libs"
    for name, pattern in _BUNDLED.items():
        for library in sorted(wheel.glob(pattern))[:1]:
            (links / name).symlink_to(library)
    environment = {name: value for name, value in os.environ.items() if name not in _PROXIES}
    environment["LD_LIBRARY_PATH"] = ":".join(filter(None, [str(links), os.environ.get("LD_LIBRARY_PATH")]))
    try:
        answer = subprocess.run([binary, "--version"], env=environment, capture_output=True, text=True)
    except OSError as error:
        raise PerfAnalyzerError(f"{binary} doesn't start: {error.strerror}") from error
    version = re.search(r"Version (\S+)", answer.stderr + answer.stdout)
    if answer.returncode or version is None:
        raise PerfAnalyzerError(_why_not(binary, answer.stderr))
    return Program(binary, environment, version[1])


def _why_not(binary: str, complaint: str) -> str:
    missing = re.search(r"loading shared libraries: ([^\s:]+): cannot open", complaint)
    if missing is None:
        return f"{binary} doesn't start: {' '.join(complaint.split()) or 'no reason given'}"
    package = _PACKAGES.get(missing[1])
    remedy = f"on Debian or Ubuntu: apt-get install {package}" if package else 'run "make setup"'
    return f"perf_analyzer lacks {missing[1]}; {remedy}"
