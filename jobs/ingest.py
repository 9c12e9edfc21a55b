"""Curates text-image pairs into Parquet shards: tars, Parquet files, image folders or lists, at file:// or s3://."""

from __future__ import annotations

from rich.console import Console

from jobs import cli
from jobs.cluster import ray_cluster
from pipelines.ingest import PAGE, IngestConfig, IngestReport, ingest


def run(config: IngestConfig) -> IngestReport:
    """Ingests on the cluster and prints what became of the pairs."""
    with ray_cluster():
        report = ingest(config)
    console = Console(soft_wrap=True)
    shards = len(report.shards) + len(report.validation_shards)
    console.print(f"kept {report.kept} of {report.read} pairs in {shards} shards at {config.output}")
    for reason, count in report.dropped.items():
        console.print(f"  dropped {count}: {reason}")
    console.print(f"{report.processed} were new, {report.seconds:.0f} s; {PAGE} shows examples")
    return report


if __name__ == "__main__":
    cli.main(run, IngestConfig, __doc__)
