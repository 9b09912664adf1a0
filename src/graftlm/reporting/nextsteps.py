"""What a person does with a run that has ended: the commands that report, table and model card show."""

import shlex
from pathlib import Path

from graftlm.files import read_json
from graftlm.models import needs_code

PAPER = "https://arxiv.org/abs/2505.24241"
CITATION = """\
@article{gu2025apex,
  title   = {Advantageous Parameter Expansion Training Makes Better Large Language Models},
  author  = {Gu, Naibin and Chen, Yilong and Zhang, Zhenyu and Fu, Peng and Lin, Zheng and Wang, Shuohuan and
             Sun, Yu and Wu, Hua and Wang, Weiping and Wang, Haifeng},
  journal = {arXiv preprint arXiv:2505.24241},
  year    = {2025}
}"""


def load_snippet(model: str, *, trust: bool = False) -> str:
    """Three lines of Python that open `model` (a folder or a Hub id) with stock transformers; `trust`: with the Python
    file that lies in it."""
    given = f"{model!r}, trust_remote_code=True" if trust else f"{model!r}"
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"model = AutoModelForCausalLM.from_pretrained({given})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({given})"
    )


def load_snippet_of(folder: Path) -> str:
    """load_snippet of the model in `folder`, whose config says whether it comes with a Python file."""
    config = folder / "config.json"
    return load_snippet(str(folder), trust=config.is_file() and "auto_map" in read_json(config))


def commands(run: Path) -> list[tuple[str, str]]:
    """(what it does, command) for the model of a run folder."""
    model = shlex.quote(str(run / "model"))
    code = " --trust-remote-code" if needs_code(run / "model") else ""
    return [
        ("try it", f'graftlm generate {model} "Once upon a time"{code}'),
        ("perplexity on a text of yours", f"graftlm eval {model} --perplexity FILE --out perplexity.json{code}"),
        ("see what its parts do", f"graftlm assess {model} --data FILE --out assessment{code}"),
    ]


def after_pruning(folder: Path) -> list[tuple[str, str]]:
    """(what it does, command) for the pruned model in `folder`."""
    model = shlex.quote(str(folder))
    trained = shlex.quote(str(folder.with_name(folder.name + "-trained")))
    return [
        ("train it", f"graftlm train --model {model} --data FILE_OR_FOLDER --output-dir {trained}"),
        ("perplexity on a text of yours", f"graftlm eval {model} --perplexity FILE --out perplexity.json"),
        ("a file for llama.cpp", f"graftlm export {model} --quantize f16 --out {shlex.quote(str(folder) + '.gguf')}"),
    ]


def reproduce(run: Path, verb: str = "train") -> str:
    """The command that does the same again, into a folder of its own."""
    again = run.with_name(run.name + "-again")
    return f"graftlm {verb} {shlex.quote(str(run / 'config.yaml'))} {shlex.quote(f'output_dir={again}')}"
