"""Tokenizers in GGUF files: llama.cpp makes the same tokens of varied text as the tokenizer does."""

import json
from pathlib import Path

import pytest
from tiny_models import tiny_model
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from graftlm.errors import UserError
from graftlm.export.checking import TEXTS, check
from graftlm.export.gguf import export_gguf
from graftlm.export.llama_cpp import ask
from graftlm.export.vocabulary import PROBE, WAYS, name_in_file, read_vocabulary, way_of
from graftlm.tiny import build_tiny_tokenizer

CORPUS = [
    *TEXTS,
    PROBE,
    "The quick brown fox jumps over 13 lazy dogs; 1999, 2024 and 100000 times.\n\n\n    if x == 10:\n        return",
    "I'M, you're, WE'VE, they'd, he'll. It's John's. 12345678901 3.14 1,000,000 ٣٤٥ x2y3",
] * 4
TEXTS_TO_SPLIT = [
    *CORPUS[:6],
    "",
    " ",
    "   \n\n \t x",
    "0" * 11 + " 7",
    "user<|im_start|>user\nHi <|im_end|>\n<|im_start|>12",
    "a<tool>b <tool> c",
    "\u200bzero width, soft\u00adhyphen, \ufeff, tabs\t\t\tend\r\n\r\n",
]


def byte_level(way: str) -> PreTrainedTokenizerFast:
    splitter, ignore_merges = WAYS[way]
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    )
    return finished(tokenizer)


def sentencepiece(prefix: bool) -> PreTrainedTokenizerFast:
    """As tokenizer.json files are that were made from SentencePiece's: Llama 2's with the prefix, Gemma's without."""
    byte_tokens = [f"<0x{i:02X}>" for i in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    ascii_corpus = [text.encode("ascii", "ignore").decode() for text in CORPUS]
    tokenizer.train_from_iterator(
        [word for text in ascii_corpus for word in text.split()],
        trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>", "<s>", "</s>", *byte_tokens], show_progress=False),
    )
    # Bytes are no special tokens in such files.
    parsed = json.loads(tokenizer.to_str())
    parsed["added_tokens"] = [t for t in parsed["added_tokens"] if t["content"] not in byte_tokens]
    return finished(Tokenizer.from_str(json.dumps(parsed)))


def finished(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    specials = ("<pad>", "<|im_start|>", "<|im_end|>")
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    tokenizer.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        clean_up_tokenization_spaces=False,
        chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}",
    )


def phi3() -> PreTrainedTokenizerFast:
    """As Phi-3's: what a special token is followed by of white space is its own."""
    tokenizer = sentencepiece(True)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    size = max(len(tokenizer), *(t["id"] + 1 for t in backend["added_tokens"]))
    loose = {"single_word": False, "lstrip": False, "normalized": False, "special": True}
    strips = {"</s>": True, "<|endoftext|>": False, "<|user|>": True, "<|end|>": True, "<|assistant|>": True}
    known = {t["content"]: t for t in backend["added_tokens"]}
    for token in ("<pad>", "<|im_start|>", "<|im_end|>", "<tool>"):
        known[token]["rstrip"] = True
    for i, (token, rstrip) in enumerate(strips.items()):
        if token in known:
            known[token]["rstrip"] = rstrip
        else:
            backend["added_tokens"].append({"id": size + i, "content": token, "rstrip": rstrip, **loose})
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)), bos_token="<s>", eos_token="<|endoftext|>",
        unk_token="<unk>", pad_token="<pad>", additional_special_tokens=["<|user|>", "<|end|>", "<|assistant|>"],
    )  # fmt: skip


CHAT = "<|user|>\nHi there<|end|>\n<|assistant|>\n  Hello <|end|> <|endoftext|>\nx"


@pytest.mark.parametrize("name", ["small", "Phi-3-mini", "phi3"])
def test_white_space_behind_special_tokens(name: str, tmp_path: Path) -> None:
    """llama.cpp goes by the file's name, whatever that is."""
    check_tokens(phi3(), tmp_path / f"{name}.gguf", [CHAT, *TEXTS_TO_SPLIT])
    check_tokens(sentencepiece(True), tmp_path / f"{name}-other.gguf", TEXTS_TO_SPLIT)
    expected = {"small": "small (phi-3)", "Phi-3-mini": "Phi-3-mini", "phi3": "phi3"}
    assert name_in_file(name, phi3()) == expected[name]
    assert "phi-3" not in name_in_file(name, sentencepiece(True)).lower()


def test_the_check_sees_white_space_behind_special_tokens(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("graftlm.export.gguf.name_in_file", lambda name, tokenizer: name)
    tokenizer = phi3()
    model = tiny_model("llama", vocab_size=-(-len(tokenizer) // 8) * 8)
    with pytest.raises(UserError, match="otherwise than the tokenizer"):
        export_gguf(model, tokenizer, tmp_path / "m.gguf", inspect=lambda file: check(file, model, tokenizer, "f32"))
    assert not (tmp_path / "m.gguf").exists()


def test_added_tokens_of_spaces_are_written_as_spaces(tmp_path: Path) -> None:
    """As Gemma has them: llama.cpp writes such tokens as they stand in the file."""
    tokenizer = sentencepiece(False)
    tokenizer.add_tokens([AddedToken("▁" * n, special=False, normalized=True) for n in (2, 4)])
    vocabulary = read_vocabulary(tokenizer, len(tokenizer))
    assert [vocabulary.tokens[tokenizer.convert_tokens_to_ids("▁" * n)] for n in (2, 4)] == ["  ", "    "]
    texts = ["def f():\n    return  1", "a  b", " x    y", TEXTS[0]]
    assert any(vocabulary.tokens[i] == "    " for i in tokenizer(texts[0])["input_ids"])
    check_tokens(tokenizer, tmp_path / "m.gguf", texts)


def test_a_space_before_the_text_alone_is_a_note(tmp_path: Path) -> None:
    """LlamaTokenizer with legacy: false, whose special tokens in a text llama.cpp reads otherwise."""
    tokenizer = sentencepiece(True)
    tokenizer.backend_tokenizer.normalizer = None
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    model = tiny_model("llama", vocab_size=-(-len(tokenizer) // 8) * 8)
    found = []
    written = export_gguf(
        model, tokenizer, tmp_path / "m.gguf", inspect=lambda file: found.append(check(file, model, tokenizer, "f32"))
    )
    assert any("at the beginning alone" in note for note in written.notes)
    assert found[0].texts == len(TEXTS)


def check_tokens(tokenizer: PreTrainedTokenizerFast, file: Path, texts: list[str]) -> None:
    model = tiny_model("llama", vocab_size=-(-len(tokenizer) // 8) * 8)
    export_gguf(model, tokenizer, file)
    theirs = ask(file, texts, [], 1).tokens
    for text, tokens in zip(texts, theirs, strict=True):
        assert tokens == tokenizer(text, add_special_tokens=False)["input_ids"], text


@pytest.mark.parametrize("way", WAYS)
def test_byte_level_tokenizers_split_alike(way: str, tmp_path: Path) -> None:
    tokenizer = byte_level(way)
    assert read_vocabulary(tokenizer, len(tokenizer)).way == way
    # llama.cpp's patterns of these two leave combining marks out of words
    texts = [text.replace("हिन्दी", "") for text in TEXTS_TO_SPLIT] if way in ("tekken", "gpt-4o") else TEXTS_TO_SPLIT
    check_tokens(tokenizer, tmp_path / "m.gguf", texts)


@pytest.mark.parametrize("prefix", (True, False))
def test_sentencepiece_tokenizers_split_alike(prefix: bool, tmp_path: Path) -> None:
    tokenizer = sentencepiece(prefix)
    check_tokens(tokenizer, tmp_path / "m.gguf", TEXTS_TO_SPLIT)


def test_a_tokenizer_without_merges(tmp_path: Path) -> None:
    check_tokens(build_tiny_tokenizer(), tmp_path / "m.gguf", TEXTS_TO_SPLIT)


def test_special_tokens_and_the_chat_template_are_in_the_file(tmp_path: Path) -> None:
    from gguf import GGUFReader, TokenType

    tokenizer = byte_level("qwen2")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
    )
    model = tiny_model("llama", vocab_size=len(tokenizer) + 5)
    file = tmp_path / "m.gguf"
    export_gguf(model, tokenizer, file)
    fields = {name: field.contents() for name, field in GGUFReader(file).fields.items() if name.startswith("tokenizer")}
    for name in ("bos", "eos"):
        assert fields[f"tokenizer.ggml.{name}_token_id"] == getattr(tokenizer, f"{name}_token_id")
    assert fields["tokenizer.ggml.padding_token_id"] == tokenizer.pad_token_id
    assert fields["tokenizer.ggml.add_bos_token"] is True
    assert fields["tokenizer.ggml.add_eos_token"] is False
    assert fields["tokenizer.chat_template"] == tokenizer.chat_template
    assert fields["tokenizer.ggml.tokens"][-5:] == [f"[PAD{i}]" for i in range(len(tokenizer), len(tokenizer) + 5)]
    types = fields["tokenizer.ggml.token_type"]
    assert types[-5:] == [TokenType.UNUSED] * 5
    assert types[tokenizer.convert_tokens_to_ids("<tool>")] == TokenType.USER_DEFINED
    assert types[tokenizer.convert_tokens_to_ids("<|im_end|>")] == TokenType.CONTROL
    assert types[tokenizer.convert_tokens_to_ids("a")] == TokenType.NORMAL


def test_tokenizers_that_gguf_cannot_hold() -> None:
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    with pytest.raises(UserError, match="Unigram tokenizer"):
        read_vocabulary(PreTrainedTokenizerFast(tokenizer_object=unigram, unk_token="<unk>"), 8)
    words = byte_level("gpt-2")
    words.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    with pytest.raises(UserError, match="no name for"):
        way_of(words.backend_tokenizer, False)
    lower = byte_level("gpt-2")
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(UserError, match="normalises text"):
        read_vocabulary(lower, len(lower))
    with pytest.raises(UserError, match="they do not fit"):
        read_vocabulary(byte_level("gpt-2"), 100)
