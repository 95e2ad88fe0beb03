"""Files of weights that hold given bytes, for tests that load no model."""

from __future__ import annotations

import io
import json
import zipfile


def safetensors(content: bytes = b"weights") -> bytes:
    """A file of safetensors with one tensor of these bytes."""
    buffer = {"dtype": "U8", "shape": [len(content)], "data_offsets": [0, len(content)]}
    header = json.dumps({"buffer": buffer}).encode()
    return len(header).to_bytes(8, "little") + header + content


def pickled(content: bytes = b"weights") -> bytes:
    """A file as torch.save frames one: a zip archive."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("archive/data.pkl", content)
    return packed.getvalue()
