"""JSON as rows: lines, or one array of objects, an object at a time."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from graftlm.errors import UserError

CHUNK = 2**17
"""Characters of an array that are read at a time."""
ONE_A_LINE = "write every object on a line of its own (.jsonl), or all of them in a list, [{...}, {...}]"


def parse_json(text: str, where: str, *, first_line: bool = False) -> Any:
    """first_line: of a file, whose object may have been spread over several."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        if first_line and text.endswith("\n") and error.pos >= len(text.rstrip()):
            raise UserError(f"{where}: the object goes on in the next line; {ONE_A_LINE}") from error
        raise UserError(f"{where}: not valid JSON ({error.msg}, column {error.colno}); mend or remove it") from error
    except (RecursionError, ValueError) as error:
        raise UserError(f"{where}: {_beyond(error)}; mend or remove it") from error


def _beyond(error: Exception) -> str:
    """What Python's JSON does not take, though it may be valid."""
    return "JSON nested too deeply" if isinstance(error, RecursionError) else f"JSON with too long a number ({error})"


def json_rows(file: IO[str], path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """(object, its line) of JSON lines, or of one array (told apart by the first character)."""
    start, number = file.read(1), 1
    while start.isspace():
        number += start == "\n"
        start = file.read(1)
    if start == "[":
        yield from _array(file, path, number)
        return
    if number > 1 and start:
        raise UserError(f"{path}:1: empty line; remove it")
    line, number = start + file.readline(), 0
    while line:
        number += 1
        where = f"{path}:{number}"
        if not line.strip():
            raise UserError(f"{where}: empty line; remove it")
        yield _object(parse_json(line, where, first_line=number == 1), where), number
        line = file.readline()


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(
            f"{where}: a JSON object is needed, not a {type(value).__name__}; write {{...}} with the columns"
        )
    return value


def _array(file: IO[str], path: Path, line: int) -> Iterator[tuple[dict[str, Any], int]]:
    """Objects of `[{...}, {...}]`, decoded one by one from a buffer, so that a large array is never held whole."""
    decoder, buffer = json.JSONDecoder(), ""
    closed, separated = False, True
    while True:
        body = buffer.lstrip()
        line += buffer.count("\n", 0, len(buffer) - len(body))
        buffer = body
        where = f"{path}:{line}"
        if closed and buffer:
            raise UserError(f"{where}: text after the closing ]; remove it, or write one object a line (.jsonl)")
        if buffer[:1] == "]":
            closed, buffer = True, buffer[1:]
            continue
        if buffer[:1] == "," and not separated:
            separated, buffer = True, buffer[1:]
            continue
        try:
            if not buffer or not separated:
                raise json.JSONDecodeError("a comma or ] is missing", buffer, 0)
            value, end = decoder.raw_decode(buffer)
        except json.JSONDecodeError as error:
            # The object may go on beyond the buffer; reading as much again keeps the work linear.
            more = file.read(max(CHUNK, len(buffer))) if separated or not buffer else ""
            if more:
                buffer += more
                continue
            if closed:
                return
            at = line + buffer.count("\n", 0, error.pos)
            raise UserError(f"{path}:{at}: not valid JSON ({error.msg}); mend the array") from error
        except (RecursionError, ValueError) as error:
            raise UserError(f"{where}: {_beyond(error)}; mend or remove it") from error
        yield _object(value, where), line
        separated = False
        line += buffer.count("\n", 0, end)
        buffer = buffer[end:]
