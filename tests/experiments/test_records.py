"""Records are written as strict JSON, whatever they contain, and are read unchanged."""

import json
import math

import pytest

from experiments import records

RECORD = {
    "step": 3,
    "loss": [1.5, math.inf, -math.inf],
    "nested": {"rate": math.nan, "name": "Infinite", "pair": (math.inf, 2)},
    "none": None,
}


def strictly(text):
    """Parses JSON as other programs do, without the numbers that only Python's reader knows."""

    def refuse(name):
        raise ValueError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("write", [records.as_line, records.as_text])
def test_numbers_that_are_not_finite_are_strings_in_the_file(write):
    with pytest.raises(ValueError, match=r"NaN|Infinity"):
        strictly(json.dumps(RECORD))
    held = strictly(write(RECORD))
    assert held["loss"] == [1.5, "Infinity", "-Infinity"]
    assert held["nested"] == {"rate": "NaN", "name": "Infinite", "pair": ["Infinity", 2]}
    assert held["none"] is None


def test_numbers_that_are_not_finite_are_read_as_numbers(tmp_path):
    records.replace_text(tmp_path / "one.json", records.as_text(RECORD))
    (tmp_path / "lines.jsonl").write_text(records.as_line(RECORD) * 2)
    found = [
        records.read_object(tmp_path / "one.json"),
        *records.read_lines(tmp_path / "lines.jsonl"),
    ]
    assert len(found) == 3
    for record in found:
        assert record["loss"] == [1.5, math.inf, -math.inf]
        assert math.isnan(record["nested"]["rate"])
        assert record["nested"]["name"] == "Infinite"
        assert record["nested"]["pair"] == [math.inf, 2]


def test_files_of_an_older_writer_are_read(tmp_path):
    """Older files have the names that Python's own writer gives to such numbers."""
    (tmp_path / "lines.jsonl").write_text(
        '{"step": 1, "loss": NaN}\n{"step": 2, "loss": -Infinity}\n'
    )
    first, second = records.read_lines(tmp_path / "lines.jsonl")
    assert math.isnan(first["loss"])
    assert second["loss"] == -math.inf
