"""`graftlm demo`: demo.yaml, on text that every machine with Python has."""

import json
import sysconfig
from importlib.resources import as_file, files
from pathlib import Path

from graftlm.configuring import load_config
from graftlm.errors import UserError
from graftlm.training.config import RunConfig

# A random model on the same text: shows every part of a run, and learns next to nothing.
QUICK = (
    "model=tiny-llama",
    "data.limit=8",
    "eval_data.limit=2",
    "max_length=128",
    "max_steps=16",
    "learning_rate=1e-3",
)


def demo_config(output_dir: Path, *, quick: bool = False) -> RunConfig:
    """The demo's config with its data on this machine. Raises UserError where Python came without its sources."""
    library = Path(sysconfig.get_path("stdlib"))
    if not any(library.glob("[a-l]*.py")):
        raise UserError(
            f"demo: {library} has no .py files (this Python came without sources); name text of your own: "
            "graftlm train --model smollm2 --data FILE"
        )
    # Quoted, because an override is read as YAML where it starts with a quote, and only then is any path safe.
    text, folder = json.dumps(str(library)), json.dumps(str(output_dir))
    overrides = [f"data.path={text}", f"eval_data.path={text}", f"output_dir={folder}", *(QUICK if quick else ())]
    with as_file(files("graftlm") / "demo.yaml") as path:
        return load_config(path, overrides)


def run_demo(output_dir: Path, *, quick: bool = False) -> Path:
    """Train as demo.yaml says and return the run folder. `quick`: a tiny random model, under a minute."""
    config = demo_config(output_dir, quick=quick)
    from graftlm.training import run  # here: torch is not needed to read the config

    size = "a tiny random model" if quick else "SmolLM2-135M-Instruct, 10 to 15 minutes on 2 cores"
    print(f"APEX, then plain training, on Python's own source text: {size}; into {config.output_dir}", flush=True)
    folder = run.train(config)
    print(f"{'your own model and text:':32}graftlm train --model MODEL --data FILE_OR_FOLDER --output-dir runs/mine")
    return folder
