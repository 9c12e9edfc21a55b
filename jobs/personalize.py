"""Generates every picture of a manifest.

With --dry-run it checks the manifest and estimates the work instead; see --dry-run --help.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from rich.console import Console

from jobs import cli, dry_run

if TYPE_CHECKING:
    from pipelines.personalize import PersonalizeConfig, PersonalizeReport


def run(config: PersonalizeConfig) -> PersonalizeReport:
    """Personalizes on the cluster and prints the counts."""
    from jobs.cluster import ray_cluster
    from pipelines.personalize import personalize

    with ray_cluster():
        report = personalize(config)
    done = report.rows - report.failed
    Console().print(f"{report.images} pictures for {done} of {report.rows} rows at {config.output}", soft_wrap=True)
    return report


if __name__ == "__main__":
    if dry_run.DRY_RUN in sys.argv:
        with cli.ending():
            dry_run.main()
    else:
        # Loading torch and Ray takes 550 MB, more than a dry run of any manifest.
        from pipelines.personalize import PersonalizeConfig

        cli.main(run, PersonalizeConfig, __doc__)
