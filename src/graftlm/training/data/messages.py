"""Messages and tools as chat templates take them: content as text, arguments and schemas as objects, no Nones."""

from typing import Any

from graftlm.errors import UserError
from graftlm.training.data.json_rows import parse_json

ROLES = ("system", "developer", "user", "assistant", "tool")
TOOL_CALL = '{"function": {"name": ..., "arguments": {...}}}'


def without_nones(value: Any) -> Any:
    """Lists and mappings without the keys that are None, at any depth: a table, whose rows all have the same keys, has
    no other way to say that one is missing."""
    if isinstance(value, dict):
        return {key: without_nones(item) for key, item in value.items() if item is not None}
    return [without_nones(item) for item in value] if isinstance(value, list) else value


def checked_messages(messages: Any, where: str) -> list[dict[str, Any]]:
    """The messages with `role` and a text as `content`, without keys that are None; UserError if they are none."""
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: no messages; give a list with at least one user and one assistant message")
    return [_message(message, f"{where}: message {number}") for number, message in enumerate(messages, start=1)]


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict) or "role" not in message:
        raise UserError(f"{where} needs the keys role and content; mend the row")
    if message["role"] not in ROLES:
        raise UserError(f"{where}: unknown role {message['role']!r}; known are {', '.join(ROLES)}")
    message = {key: value for key, value in message.items() if value is not None}
    if message.get("function_call"):
        raise UserError(f"{where}: function_call is not read; write it as tool_calls: [{TOOL_CALL}]")
    if message.get("tool_calls"):
        message["tool_calls"] = _tool_calls(message["tool_calls"], where)
        message["content"] = message.get("content") or ""
    if isinstance(message.get("content"), list) and message["content"]:
        message["content"] = "".join(_text_of(part, where) for part in message["content"])
    if not isinstance(message.get("content"), str):
        raise UserError(f"{where} has no content; mend or remove the row")
    return message


def _text_of(part: Any, where: str) -> str:
    """Of a part of a message: templates leave out parts that they do not expect, or write them as Python would."""
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type", "without a type") if isinstance(part, dict) else type(part).__name__
    raise UserError(
        f'{where}: content has a part that is no text ({kind}); only {{"type": "text", "text": ...}} is read; mend or '
        "remove the row"
    )


def function_of(entry: dict[str, Any]) -> dict[str, Any]:
    """The part with the name, of a tool call or a tool: under `function`, as in OpenAI's form, or the whole."""
    function = entry.get("function")
    return function if isinstance(function, dict) else entry


def with_function(entry: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A tool call or a tool with changes in that part."""
    function = function_of(entry) | changes
    return function if function_of(entry) is entry else entry | {"function": function}


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """With arguments as objects: written as a JSON string (OpenAI's form), templates would encode them once more."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise UserError(f"{where}: tool_calls must be a list of {TOOL_CALL}; mend the row")
    found = []
    for call in calls:
        function = function_of(call)
        if not isinstance(function.get("name"), str) or not function["name"]:
            raise UserError(f"{where}: a tool call has no name; write {TOOL_CALL}")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            what = f"{where}: arguments of {function['name']}"
            arguments = parse_json(arguments, what) if arguments.strip() else {}
            if not isinstance(arguments, dict):
                raise UserError(f"{what} are a JSON {type(arguments).__name__}, not an object; mend the row")
            call = with_function(call, arguments=arguments)
        found.append(call)
    return found


def checked_tools(tools: Any, where: str) -> list[dict[str, Any]] | None:
    """A list of JSON schemas; it, or each of them, may be written as a JSON string. None where there are none."""
    if isinstance(tools, str) and tools.strip():
        tools = parse_json(tools, f"{where}: column tools")
    if not tools or (isinstance(tools, str) and not tools.strip()):
        return None
    if isinstance(tools, list):
        tools = [parse_json(tool, f"{where}: column tools") if isinstance(tool, str) else tool for tool in tools]
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(
            f"{where}: column tools is no list of JSON schemas; mend the row, or remove or rename the column"
        )
    return tools


Names = dict[str, tuple[str, str]]
"""Of stand-ins: what carries the name (a message's call, a tool), and the real name."""


def with_stand_ins(
    messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None, Names]:
    """Messages and tools in which every tool call and every tool has a name that occurs nowhere else: what a template
    writes of them is told by it. The real ones are often words of the text, or of the tools."""
    names: Names = {}

    def renamed(entry: dict[str, Any], what: str) -> dict[str, Any]:
        name = function_of(entry).get("name")
        if not isinstance(name, str):
            return entry
        stand_in = f"stand_in_{len(names)}_"
        names[stand_in] = (what, name)
        return with_function(entry, name=stand_in)

    changed = []
    for number, message in enumerate(messages, start=1):
        calls = [renamed(call, f"message {number}: the call of") for call in message.get("tool_calls") or []]
        changed.append(message | {"tool_calls": calls} if calls else message)
    return changed, [renamed(tool, "the tool") for tool in tools or []] or None, names
