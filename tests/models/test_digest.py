"""The digest of a model's weights changes with them and costs little for large files."""

import os

from mmtune.models import digest
from mmtune.models.digest import weights_digest


def test_it_is_of_the_weights_and_not_of_the_place(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(b"weights")
    first = weights_digest(str(tmp_path / "one"))
    assert first == weights_digest(str(tmp_path / "two"))
    (tmp_path / "two" / "model.safetensors").write_bytes(b"Weights")
    assert first != weights_digest(str(tmp_path / "two"))


def test_pieces_of_a_large_file_reach_from_its_start_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(digest, "_WHOLE", 1000)
    monkeypatch.setattr(digest, "_PIECE", 16)
    content = os.urandom(4096)
    (tmp_path / "model.safetensors").write_bytes(content)
    first = weights_digest(str(tmp_path))
    for place in (0, 4095):
        changed = bytearray(content)
        changed[place] ^= 1
        (tmp_path / "model.safetensors").write_bytes(changed)
        assert weights_digest(str(tmp_path)) != first, place
