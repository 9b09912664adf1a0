"""Chat templates that ship with the package, each with {% generation %} markers around what the assistant says."""

from importlib.resources import files
from pathlib import Path

from graftlm.errors import UserError

KNOWN = ("chatml",)


def read_chat_template(name: str) -> str:
    """The Jinja text of a known template (`KNOWN`) or of a file.

    Raises UserError when `name` is neither, or the file is not UTF-8 text. Whether it is good Jinja shows when it is
    first rendered (`load_tokenizer` does that).
    """
    if name in KNOWN:
        return files(__package__).joinpath(f"{name}.j2").read_text(encoding="utf-8")
    path = Path(name).expanduser()
    if not path.is_file():
        raise UserError(f"chat_template: {name} is no file and no known template; known: {', '.join(KNOWN)}")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"chat_template: {name} cannot be read ({error}); give a UTF-8 Jinja file") from error
