"""Generates every picture of a manifest."""

from __future__ import annotations

from rich.console import Console

from jobs import cli
from jobs.cluster import ray_cluster
from pipelines.personalize import PersonalizeConfig, PersonalizeReport, personalize


def run(config: PersonalizeConfig) -> PersonalizeReport:
    """Personalizes on the cluster and prints the counts."""
    with ray_cluster():
        report = personalize(config)
    done = report.rows - report.failed
    Console().print(f"{report.images} pictures for {done} of {report.rows} rows at {config.output}", soft_wrap=True)
    return report


if __name__ == "__main__":
    cli.main(run, PersonalizeConfig, __doc__)
