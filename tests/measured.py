"""What a job took: a program that runs it and tells at its end."""

from __future__ import annotations

from dataclasses import dataclass

# VmHWM, since ru_maxrss begins with the parent's.
MEASURED = """
import atexit, pathlib, runpy, sys, time
def tell():
    peak = pathlib.Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]
    print("measured:", peak, time.process_time(), *{"torch", "ray"} & set(sys.modules), file=sys.stderr)
atexit.register(tell)
runpy.run_module("jobs.personalize", run_name="__main__", alter_sys=True)
"""
"""For `python -c`, with the job's arguments behind it; needs /proc."""


@dataclass(frozen=True, kw_only=True)
class Taken:
    """By the process itself, its children apart."""

    megabytes: float
    """At most."""
    cpu_s: float
    heavy: tuple[str, ...]
    """Of torch and ray, those that were loaded."""

    @classmethod
    def of(cls, stderr: str) -> Taken:
        """What MEASURED told."""
        kilobytes, seconds, *heavy = stderr.rpartition("measured:")[2].split()
        return cls(megabytes=int(kilobytes) / 1000, cpu_s=float(seconds), heavy=tuple(heavy))
