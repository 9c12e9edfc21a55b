"""Measures speed as ratios against a stated alternative, warm, as medians of interleaved runs; prints JSON."""

from __future__ import annotations

from jobs import cli
from jobs.benchmarks.adapter import adapter
from jobs.benchmarks.bulk import bulk
from jobs.benchmarks.million import million

if __name__ == "__main__":
    cli.commands({"adapter": adapter, "bulk": bulk, "million": million}, __doc__)
