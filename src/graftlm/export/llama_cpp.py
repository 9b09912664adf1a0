"""Running a GGUF file with llama.cpp (PyPI's `xllamacpp`), in a process of its own: llama.cpp answers what it cannot
do by ending the process that it runs in."""

import importlib.util
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftlm.errors import UserError

INSTALL = "pip install 'graftlm[export]'"
_SEES = 4096
"""Tokens of context it runs with, at most."""


@dataclass(frozen=True)
class Answers:
    """What llama.cpp said of a file."""

    tokens: list[list[int]]
    """Of every text."""
    log_probabilities: list[dict[int, float]]
    """Of the likeliest next tokens, by id, after each prompt."""


def is_installed() -> bool:
    """Whether llama.cpp can be run here."""
    return importlib.util.find_spec("xllamacpp") is not None


def ask(file: Path, texts: Sequence[str], prompts: Sequence[Sequence[int]], count: int, threads: int = 1) -> Answers:
    """Open `file` and have it tokenise `texts` (special tokens parsed, none added) and say the log-probabilities of
    the `count` likeliest tokens after each of `prompts` (ids, at least one each).

    The key-value cache is float32 and flash attention off, so that nothing but the file's weights is rounded.
    Raises UserError with llama.cpp's own last words when it does not take the file.
    """
    if not is_installed():
        raise UserError(f"running a GGUF file needs xllamacpp, which is not installed: {INSTALL}")
    question = {
        "file": str(file),
        "texts": list(texts),
        "prompts": [list(map(int, prompt)) for prompt in prompts],
        "count": count,
        "threads": threads,
    }
    done = subprocess.run(
        [sys.executable, "-m", "graftlm.export.llama_cpp"],
        input=json.dumps(question),
        capture_output=True,
        text=True,
        env={**os.environ, "GGML_NO_BACKTRACE": "1"},
    )
    answer = done.stdout.rpartition("\n" + _MARK)[2]
    if done.returncode or not answer:
        raise UserError(f"{file}: llama.cpp does not take it: {_reason(done.stderr + done.stdout)}")
    said = json.loads(answer)
    return Answers(said["tokens"], [{int(i): p for i, p in row.items()} for row in said["log_probabilities"]])


_MARK = "graftlm's answer: "


def _reason(log: str) -> str:
    """The line of llama.cpp's log that says most."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    telling = [line for line in lines if any(word in line.lower() for word in ("error", "assert", "failed", "abort"))]
    return (telling or lines or ["it ended without a word"])[0]


def open_server(file: str, *, context: int, threads: int, exact: bool = True) -> Any:
    """llama.cpp's server on `file`, in this process, on the CPU. `exact`: as `ask` says."""
    import xllamacpp as x

    params = x.CommonParams()
    params.model.path = file
    params.n_ctx = context
    params.n_batch = params.n_ubatch = min(context, 512)
    params.n_parallel = 1
    params.n_gpu_layers = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.warmup = False
    params.fit_params = False
    params.cache_ram_mib = 0
    params.verbosity = 3 if exact else 0  # what it says of a file that it does not take is wanted
    if exact:
        params.flash_attn_type = x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cache_type_k = params.cache_type_v = x.ggml_type.GGML_TYPE_F32
    return x.Server(params)


def _answer(question: dict[str, Any]) -> dict[str, Any]:
    longest = max((len(prompt) for prompt in question["prompts"]), default=0)
    server = open_server(question["file"], context=min(_SEES, longest + 8), threads=question["threads"])
    rows = []
    # An answer that ends at once, or in half a character, comes without probabilities: make it say "a". Those that it
    # reports are the model's own, before the bias.
    letter = _post(server, "/tokenize", {"content": "a"})["tokens"][-1]
    for prompt in question["prompts"]:
        given = {"prompt": prompt, "n_predict": 1, "temperature": 0.0, "cache_prompt": False}
        said = server.handle_completions({**given, "n_probs": question["count"], "logit_bias": [[letter, 1e4]]})
        if "choices" not in said:
            raise RuntimeError(f"error: {said}")
        first = said["choices"][0]["logprobs"]["content"][0]
        rows.append({entry["id"]: entry["logprob"] for entry in first["top_logprobs"]})
    tokens = [
        _post(server, "/tokenize", {"content": text, "parse_special": True})["tokens"] for text in question["texts"]
    ]
    return {"tokens": tokens, "log_probabilities": rows}


def _post(server: Any, path: str, value: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        server.listening_address + path, json.dumps(value).encode(), {"Content-Type": "application/json"}
    )
    for attempt in range(20):  # the address answers a moment after the model is there
        try:
            with urllib.request.urlopen(request) as response:
                return json.load(response)
        except OSError:
            if attempt == 19:
                raise
            time.sleep(0.1)


if __name__ == "__main__":
    answers = _answer(json.load(sys.stdin))
    print(f"\n{_MARK}{json.dumps(answers)}", flush=True)
