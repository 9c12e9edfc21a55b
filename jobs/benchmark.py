"""Measures speed as ratios against a stated alternative, warm, as medians of interleaved runs; prints JSON."""

from __future__ import annotations

from jobs import cli
from jobs.benchmarks.adapter import adapter
from jobs.benchmarks.autoscaling import autoscaling
from jobs.benchmarks.bulk import bulk
from jobs.benchmarks.engine import engine
from jobs.benchmarks.feed import feed
from jobs.benchmarks.million import million
from jobs.benchmarks.serve import serve
from jobs.benchmarks.train import train

COMMANDS = {
    "adapter": adapter,
    "autoscaling": autoscaling,
    "bulk": bulk,
    "engine": engine,
    "feed": feed,
    "million": million,
    "serve": serve,
    "train": train,
}

if __name__ == "__main__":
    cli.commands(COMMANDS, __doc__)
