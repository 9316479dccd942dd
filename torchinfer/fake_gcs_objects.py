"""The files of a folder as the objects of `torchinfer.fake_gcs`: names, metadata, generations."""

from __future__ import annotations

import base64
import hashlib
import os
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

BLOCK_BYTES = 8 << 20
TIME_FORMAT = "%Y-%m-%dT%H:%M:%S.%fZ"


class Objects:
    """The files under `root` as objects, each with a generation that follows from what `stat` says of it."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._checksums: dict[tuple[str, str], str] = {}  # by path and generation
        self.num_uploads: dict[str, int] = {}  # beyond what `stat` shows

    def path(self, bucket: str, name: str) -> Path | None:
        """The file of an object, if there is one."""
        path = self._root / bucket / name
        return path if ".." not in path.parts and path.is_file() else None

    def generation(self, bucket: str, name: str) -> str:
        status = (self._root / bucket / name).stat()
        facts = (status.st_mtime_ns, status.st_size, status.st_ino, self._uploads(bucket, name))
        return str(int.from_bytes(hashlib.blake2b(repr(facts).encode(), digest_size=7).digest(), "big"))

    def metadata(self, bucket: str, name: str, endpoint: str, *, checksums: bool) -> dict[str, str]:
        """The object's resource (https://cloud.google.com/storage/docs/json_api/v1/objects)."""
        generation = self.generation(bucket, name)
        status = (self._root / bucket / name).stat()
        updated = datetime.fromtimestamp(status.st_mtime + self._uploads(bucket, name), UTC)
        place = f"/storage/v1/b/{bucket}/o/{quote(name, safe='')}"
        resource = {
            "kind": "storage#object",
            "id": f"{bucket}/{name}/{generation}",
            "name": name,
            "bucket": bucket,
            "generation": generation,
            "metageneration": "1",
            "size": str(status.st_size),
            "contentType": "application/octet-stream",
            "storageClass": "STANDARD",
            "etag": generation,
            "timeCreated": updated.strftime(TIME_FORMAT),
            "updated": updated.strftime(TIME_FORMAT),
            "selfLink": endpoint + place,
            "mediaLink": f"{endpoint}/download{place}?generation={generation}&alt=media",
        }
        if checksums:
            resource["crc32c"] = self._crc32c(bucket, name, generation)
        return resource

    def entries(self, bucket: str, prefix: str, delimiter: str) -> list[str] | None:
        """Names that begin with `prefix`, sorted; those with `delimiter` behind it are cut there, and listed once."""
        base = self._root / bucket
        if not base.is_dir():
            return None
        found = set()
        for folder, _, files in os.walk(base, followlinks=True):
            for file in files:
                name = (Path(folder) / file).relative_to(base).as_posix()
                if name.startswith(prefix):
                    end = name.find(delimiter, len(prefix)) if delimiter else -1
                    found.add(name[: end + len(delimiter)] if end >= 0 else name)
        return sorted(found)

    def _uploads(self, bucket: str, name: str) -> int:
        return self.num_uploads.get(f"{bucket}/{name}", 0)

    def _crc32c(self, bucket: str, name: str, generation: str) -> str:
        import google_crc32c  # comes with gcsfs

        key = (f"{bucket}/{name}", generation)
        if key not in self._checksums:
            checksum = 0
            with (self._root / bucket / name).open("rb") as file:
                while block := file.read(BLOCK_BYTES):
                    checksum = google_crc32c.extend(checksum, block)
            self._checksums[key] = base64.b64encode(checksum.to_bytes(4, "big")).decode()
        return self._checksums[key]
