"""Curates text-image pairs with masks into Parquet shards."""

from __future__ import annotations

from rich.console import Console

from jobs import cli
from jobs.cluster import ray_cluster
from pipelines.ingest import IngestConfig, IngestReport, ingest


def run(config: IngestConfig) -> IngestReport:
    """Ingests on the cluster and prints what became of the pairs."""
    with ray_cluster():
        report = ingest(config)
    console = Console()
    console.print(f"kept {report.kept} of {report.read} pairs in {len(report.shards)} shards at {config.output}")
    for reason, count in report.dropped.items():
        console.print(f"  dropped {count}: {reason}")
    return report


if __name__ == "__main__":
    cli.main(run, IngestConfig, __doc__)
