"""What chaos needs: an S3 server that the user brings, and a bucket of its own in it."""

from __future__ import annotations

import os
import secrets

import pytest


@pytest.fixture(scope="session")
def s3_server() -> str:
    """The endpoint of a real S3 server, from the usual AWS_* settings."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL")
    if not endpoint:
        pytest.skip("bring an S3 server: set AWS_ENDPOINT_URL and its AWS_* credentials")
    # Many self-hosted servers reject the checksums that clients add by default.
    os.environ["AWS_REQUEST_CHECKSUM_CALCULATION"] = "when_required"
    return endpoint


@pytest.fixture(scope="session")
def bucket(s3_server: str) -> str:
    """A new, unversioned bucket; it is left there for a look at what went wrong."""
    import boto3

    name = f"chaos-{secrets.token_hex(4)}"
    boto3.client("s3").create_bucket(Bucket=name)
    return name
