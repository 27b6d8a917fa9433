"""Records on the disk: files of strict JSON that are written whole or not at all.

Other programs may read records too, so they contain no `NaN`. All functions that read records check
them: for a file that is cut short or was not written by this package they raise a
`DamagedRecordError` that names it.
"""

import json
import math
import os
import pathlib
from typing import Any


class DamagedRecordError(ValueError):
    """A file of a run is not as this package writes it; the text names the file and the problem."""


def brief(path: pathlib.Path | str) -> str:
    """A path for a message, with its middle left out if it is long."""
    text = str(path)
    return text if len(text) <= 120 else f"{text[:40]} ... {text[-75:]}"


def as_line(record: dict[str, Any]) -> str:
    """A record as one line of strict JSON, which other programs can read too.

    Numbers that are not finite do not exist in JSON; they become the strings "NaN", "Infinity" and
    "-Infinity", which `read_json` and `read_lines` turn into numbers again.
    """
    return json.dumps(_with_names(record), allow_nan=False) + "\n"


def as_text(record: dict[str, Any]) -> str:
    """A record as indented strict JSON; values of types unknown to JSON become strings."""
    return json.dumps(_with_names(record), indent=2, default=str, allow_nan=False) + "\n"


def read_json(path: pathlib.Path) -> Any:
    """The contents of a JSON file; None if there is no file. Raises DamagedRecordError."""
    text = _read_text(path)
    if text is None:
        return None
    if not text.strip():
        raise DamagedRecordError(f"{path} is empty")
    try:
        return _with_numbers(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise DamagedRecordError(f"{path} is not JSON: {error}") from None


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """The records of a file with one JSON object per line; a last line cut short is ignored.

    Raises:
        DamagedRecordError: if a line is not an object with a step; it names the file and the line.
    """
    text = _read_text(path)
    records = []
    for number, line in enumerate((text or "").split("\n")[:-1], start=1):
        try:
            record = _with_numbers(json.loads(line))
        except (ValueError, RecursionError):
            raise DamagedRecordError(f"{path} is not JSON in line {number}") from None
        if not isinstance(record, dict) or type(record.get("step")) is not int:
            raise DamagedRecordError(f"{path} has no step in line {number}")
        records.append(record)
    return records


def read_object(path: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file, which must exist. Raises DamagedRecordError."""
    record = read_json(path)
    if not isinstance(record, dict):
        raise DamagedRecordError(f"{path} must be a JSON object, got {type(record).__name__}")
    return record


def _read_text(path: pathlib.Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except UnicodeError:
        raise DamagedRecordError(f"{path} is not text") from None
    except OSError as error:
        raise DamagedRecordError(f"{path} cannot be read: {error.strerror}") from None


def replace_text(path: pathlib.Path, text: str) -> None:
    """Writes a file so that at any moment it holds either the old text or the new one."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _with_names(record: Any) -> Any:
    """A record with numbers that are not finite replaced by their names."""
    if isinstance(record, dict):
        return {key: _with_names(value) for key, value in record.items()}
    if isinstance(record, list | tuple):
        return [_with_names(value) for value in record]
    if isinstance(record, float) and not math.isfinite(record):
        return "NaN" if math.isnan(record) else "Infinity" if record > 0 else "-Infinity"
    return record


def _with_numbers(record: Any) -> Any:
    """The inverse of `_with_names`."""
    if isinstance(record, dict):
        return {key: _with_numbers(value) for key, value in record.items()}
    if isinstance(record, list):
        return [_with_numbers(value) for value in record]
    return _NON_FINITE.get(record, record) if isinstance(record, str) else record
