"""The commands on architecture documents."""

import json
from pathlib import Path

import pytest

from experiments import evolve

ARCHS = sorted((Path(evolve.__file__).parent / "archs").glob("*.yaml"))


@pytest.mark.parametrize("path", ARCHS, ids=lambda path: path.stem)
def test_shipped_documents_are_valid(path, capsys):
    assert evolve.main(evolve.Validate((path,), strict=True)) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"VALID {path}\nfingerprint ")
    assert "note" not in out


def test_a_bad_document_is_told_and_fails(tmp_path, capsys):
    good = ARCHS[0].read_text()
    (tmp_path / "a.yaml").write_text(good.replace("heads: 6", "heads: 7"))
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    files = (tmp_path / "a.yaml", ARCHS[0], tmp_path / "b.yaml", tmp_path / "absent.yaml")
    assert evolve.main(evolve.Validate(files)) == 1
    out = capsys.readouterr().out
    assert out.count("INVALID") == 3
    assert "arch.mix_unit.mixer.heads (line 7): must divide d_model 192, got 7" in out


def test_the_schema_is_written(tmp_path):
    assert evolve.main(evolve.Schema(tmp_path / "s.json")) == 0
    schema = json.loads((tmp_path / "s.json").read_text())
    assert schema["additionalProperties"] is False
