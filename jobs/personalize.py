"""Generates every picture of a manifest.

With --dry-run it checks the manifest and estimates the work instead; see --dry-run --help.
"""

from __future__ import annotations

import sys

from jobs import cli, dry_run

if __name__ == "__main__":
    if dry_run.DRY_RUN in sys.argv:
        with cli.ending():
            dry_run.main()
    else:
        # Loading torch and Ray takes 550 MB, more than a dry run of any manifest.
        from jobs.bulk import BulkConfig, run

        cli.main(run, BulkConfig, __doc__)
