"""Write container images for tests and benchmarks."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path

_MEDIA = "application/vnd.oci.image"


def write_image(
    path: Path, layers: Sequence[io.BufferedIOBase], name: str, command: Sequence[str] = ()
) -> str:
    """Write an image as an archive in the OCI layout, as ``ctr images import`` reads it.

    ``layers`` are uncompressed archives, the lowest first. Returns the digest of the manifest.
    """
    with tarfile.open(path, "w") as archive:

        def add(name: str, content: io.BufferedIOBase) -> int:
            info = tarfile.TarInfo(name)
            info.size = content.seek(0, os.SEEK_END)
            content.seek(0)
            archive.addfile(info, content)
            return info.size

        def blob(kind: str, content: io.BufferedIOBase) -> dict[str, object]:
            content.seek(0)
            digest = hashlib.file_digest(content, "sha256").hexdigest()
            size = add(f"blobs/sha256/{digest}", content)
            return {"mediaType": f"{_MEDIA}.{kind}", "digest": f"sha256:{digest}", "size": size}

        platform = {"architecture": "amd64", "os": "linux"}
        blobs = [blob("layer.v1.tar", layer) for layer in layers]
        configuration = {
            **platform,
            "config": {"Cmd": [*command], "Env": ["PATH=/bin"]},
            "rootfs": {"type": "layers", "diff_ids": [layer["digest"] for layer in blobs]},
        }
        manifest = {
            "schemaVersion": 2,
            "mediaType": f"{_MEDIA}.manifest.v1+json",
            "config": blob("config.v1+json", _json(configuration)),
            "layers": blobs,
        }
        described = blob("manifest.v1+json", _json(manifest))
        named = {"platform": platform, "annotations": {"io.containerd.image.name": name}}
        add("index.json", _json({"schemaVersion": 2, "manifests": [described | named]}))
        add("oci-layout", _json({"imageLayoutVersion": "1.0.0"}))
    return str(described["digest"])


def _json(value: object) -> io.BufferedIOBase:
    return io.BytesIO(json.dumps(value).encode())
