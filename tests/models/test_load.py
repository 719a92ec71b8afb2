"""Model folders whose weights cannot be used are named, with the exit code of the contract."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from mmtune.errors import IntegrityError
from mmtune.models.load import load_model


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:2000])


def other_header(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[5] ^= 0xFF
    file.write_bytes(raw)


def without_one(file: Path) -> None:
    tensors = load_file(file)
    del tensors[min(tensors)]
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "code", "said"),
    [
        (cut, "damaged_weights", "are cut or damaged"),
        (other_header, "damaged_weights", "are cut or damaged"),
        (without_one, "missing_weights", "weights, such as"),
    ],
)
def test_damaged_weights_are_an_integrity_error(
    tiny_vlm: Path, tmp_path: Path, damage: Callable[[Path], None], code: str, said: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_vlm, folder)
    damage(folder / "model.safetensors")
    with pytest.raises(IntegrityError) as error:
        load_model(str(folder), offline=True)
    assert error.value.exit_code == 7 and error.value.code == code
    assert str(folder) in error.value.message and said in error.value.message
