"""Stands in for s3fs, whose name fsspec imports for addresses of s3://: buckets are folders in $FAKE_S3."""

from __future__ import annotations

import os

from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

__version__ = "2026.9.0"


class S3FileSystem(DirFileSystem):
    protocol = ("s3", "s3a")
    cachable = False

    def __init__(self, **_):
        super().__init__(path=os.environ["FAKE_S3"], fs=LocalFileSystem(auto_mkdir=True))

    def _join(self, path):
        return super()._join(self._strip_protocol(path))

    @classmethod
    def _strip_protocol(cls, path):
        return path.removeprefix("s3://").removeprefix("s3a://").rstrip("/")

    def unstrip_protocol(self, name):
        return f"s3://{self._strip_protocol(name)}"

    def split_path(self, path):
        bucket, _, key = self._strip_protocol(path).partition("/")
        return bucket, key, None
