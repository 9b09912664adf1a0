"""`graftlm export`: formats, default paths, and what it says to people."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

from graftlm import cli
from graftlm.export import llama_cpp
from graftlm.export.verb import licence_of
from graftlm.pruning.saving import save_pruned
from graftlm.pruning.surgery import keep_components, prunable_blocks
from graftlm.tiny import build_tiny_tokenizer


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "small"
    model = tiny_model("llama", vocab_size=264, max_position_embeddings=256)
    first = prunable_blocks(model)[1]
    model = keep_components(model, {first.name: torch.arange(7)})
    save_pruned(model, build_tiny_tokenizer(), folder, card="---\nlicense: apache-2.0\ntags: [x]\n---\n# small\n")
    return folder


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = cli.main(["export", *map(str, words)])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_gguf_is_written_beside_the_model_and_checked(uneven: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, uneven)
    assert code == 0, err
    file = uneven / "small-f32.gguf"
    assert file.is_file()
    assert f"{file}: deci, f32" in out
    assert "the likeliest token is the same at 12 of 12 positions" in out
    from gguf import GGUFReader

    assert GGUFReader(file).fields["general.license"].contents() == "apache-2.0"


def test_without_llama_cpp_it_writes_and_says_that_nothing_was_run(
    uneven: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)
    file = tmp_path / "a" / "m.gguf"
    code, out, _ = run(capsys, uneven, "--out", file, "--quantize", "f16")
    assert code == 0 and file.is_file()
    assert "not run: xllamacpp is not installed" in out
    code, _, err = run(capsys, uneven, "--out", tmp_path / "b.gguf", "--check")
    assert code == 2 and "graftlm[export]" in err and not (tmp_path / "b.gguf").exists()
    code, out, _ = run(capsys, uneven, "--out", tmp_path / "c.gguf", "--no-check")
    assert code == 0 and "not run (--no-check)" in out


def test_padded_is_a_stock_checkpoint_that_computes_the_same(
    uneven: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, uneven, "--format", "padded", "--out", tmp_path / "p")
    assert code == 0, err
    assert "opens with AutoModelForCausalLM, as model type llama" in out
    ids = torch.arange(3, 20)[None]
    from graftlm.models import load_model

    with torch.no_grad():
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "p")(ids).logits
        torch.testing.assert_close(stock, load_model(str(uneven))(ids).logits, rtol=0, atol=1e-5)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "p")).__name__ == "LlamaForCausalLM"
    card = (tmp_path / "p/README.md").read_text()
    assert licence_of(tmp_path / "p") == "apache-2.0"
    assert f"`{uneven}`, whose layers are of different widths" in card and "trust_remote_code" not in card
    assert "| 0 | 4 | 2 | 7 |" in card  # before padding
    code, out, _ = run(capsys, tmp_path / "p", "--format", "stock", "--out", tmp_path / "s")
    assert code == 0 and "is a stock llama checkpoint already" in out
    assert licence_of(tmp_path / "s") == "apache-2.0"
    copied = (tmp_path / "s/README.md").read_text()
    assert card.split("---")[2].strip() in copied and f"from `{tmp_path / 'p'}`, with the same weights" in copied
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "s").num_parameters() > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--format", "stock", "--out", "x"], "no stock checkpoint; --format padded makes it one"),
        (["--format", "padded"], "name it: --out DIR"),
        (["--format", "padded", "--quantize", "f16", "--out", "x"], "--quantize is for --format gguf"),
        (["--out", "."], "is a folder; name the file"),
        (["--quantize", "q8_0", "--no-check"], "blk.0.ffn_down.weight has 7; "),
        (["--format", "padded", "--check", "--out", "p"], "--check runs a GGUF file; --format padded writes none"),
        (["--quantize", "q4_k_m"], "llama-quantize (its K-quants need widths that are multiples of 256"),
        (["--out", "small/model.safetensors"], "small/model.safetensors is there and no GGUF file"),
        (["--format", "padded", "--out", "."], "cannot be replaced; give a folder in it"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], said: str, uneven: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(uneven.parent)
    before = sorted(path.name for path in uneven.parent.iterdir())
    try:
        code, _, err = run(capsys, uneven, *words)
    except SystemExit as stop:
        code, err = int(str(stop.code)), capsys.readouterr().err
    assert code == 2 and err.count("\n") == 1
    assert said in err
    assert sorted(path.name for path in uneven.parent.iterdir()) == before


def test_a_folder_is_not_written_over_itself(uneven: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, uneven, "--format", "padded", "--out", uneven)
    assert code == 2 and "the model's own folder" in err
    mine = uneven.parent / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    code, _, err = run(capsys, uneven, "--format", "padded", "--out", mine)
    assert code == 2 and "not empty" in err and err.count("\n") == 1
    assert (mine / "thesis.txt").read_text() == "years of work"
    assert licence_of(uneven) == "apache-2.0"


def test_the_verb_is_there_without_llama_cpp_or_torch() -> None:
    loaded = "import sys; from graftlm.cli import make_parser; make_parser(); print([m for m in ('torch', 'gguf', "
    code = f"{loaded}'xllamacpp', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.slow
@pytest.mark.parametrize("layers_differ", (False, True))
def test_smollm2(layers_differ: bool, tmp_path: Path) -> None:
    """The real tokenizer, and activations up to 20,000."""
    from graftlm.export.checking import check
    from graftlm.export.gguf import export_gguf
    from graftlm.models import load_model, load_tokenizer

    model, tokenizer = load_model("smollm2"), load_tokenizer("smollm2")
    if layers_differ:  # at random, one layer without attention: the case of docs/export.md
        generator, kept = torch.Generator().manual_seed(0), {}
        for block in prunable_blocks(model):
            least = block.components // 2 if block.kind == "channels" else 1
            count = int(torch.randint(least, block.components + 1, (1,), generator=generator))
            count = 0 if block.kind == "heads" and block.layer == 7 else count
            kept[block.name] = torch.randperm(block.components, generator=generator)[:count].sort().values
        model = keep_components(model, kept)
    written = export_gguf(model, tokenizer, tmp_path / "m.gguf", kind="f32")
    assert written.architecture == ("deci" if layers_differ else "llama")
    found = check(written.path, model, tokenizer, "f32")
    # 3e-5 with this draw, 2e-4 with another; whole, 4e-5.
    assert found.difference < (3e-4 if layers_differ else 1e-4) and found.same_first == found.positions
