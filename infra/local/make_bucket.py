"""Waits for an S3 server and makes a bucket: `python make_bucket.py BUCKET`, endpoint and credentials from AWS_*."""

import sys
import time

import botocore.session
from botocore.exceptions import BotoCoreError, ClientError

TIMEOUT_S = 60.0
EXISTS = "BucketAlreadyOwnedByYou"


def make_bucket(bucket: str) -> None:
    """Creates the bucket unless it is there, as soon as the server answers.

    Raises:
        BotoCoreError: nobody answered within a minute.
        ClientError: the server refuses.
    """
    client = botocore.session.Session().create_client("s3")
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        try:
            client.create_bucket(Bucket=bucket)
        except ClientError as error:
            if error.response["Error"]["Code"] != EXISTS:
                raise
        except BotoCoreError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
            continue
        return


if __name__ == "__main__":
    try:
        make_bucket(sys.argv[1])
    except (BotoCoreError, ClientError) as error:
        sys.exit(f"cannot make bucket {sys.argv[1]}: {error}")
