"""What a result depends on beside its settings: versions, hardware, commit. Nothing that names a person or host."""

import datetime
import importlib.metadata
import os
import platform
import resource
import subprocess
from pathlib import Path
from typing import Any

import psutil
import torch

PACKAGES = ("torch", "transformers", "accelerate", "trl", "peft", "datasets", "lm_eval", "safetensors", "tokenizers")
GIT_SECONDS = 10


def describe_environment() -> dict[str, Any]:
    """Versions (None: not installed), platform, processors, memory in bytes, GPUs, commit and UTC date, as JSON values.

    `git_commit` is None outside a checkout of this package; `git_changed` says whether the package's own files differ
    from it: results that a comparison writes into the checkout do not count.
    """
    commit, changed = _git_state(Path(__file__).resolve().parent)
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "graftlm": _version("graftlm"),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu_count": usable_processors(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())],
        "git_commit": commit,
        "git_changed": changed,
    }


def hardware(environment: dict[str, Any]) -> tuple[Any, ...]:
    """What of an environment decides how fast a run is."""
    gpus = tuple(gpu["name"] for gpu in environment.get("gpus") or [])
    return environment.get("platform"), environment.get("cpu_count"), environment.get("threads"), gpus


def peak_memory_bytes() -> int:
    """Most memory held so far: by tensors on the GPU where there is one, else by this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage: on Linux its peak survives exec, so a child would report what its parent held.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def usable_processors() -> int:
    """Those this process may run on, which in a container or a batch job are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {"name": properties.name, "memory_bytes": properties.total_memory}


def _git_state(folder: Path) -> tuple[str | None, bool | None]:
    """(commit, changed) of the checkout that tracks the package in `folder`.

    A package installed into a virtual environment inside somebody else's repository is not tracked by it, and must not
    take that repository's commit for its own.
    """
    if _git(folder, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None, None
    status = _git(folder, "status", "--porcelain", "--", ".")
    return _git(folder, "rev-parse", "HEAD"), None if status is None else bool(status)


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=GIT_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
