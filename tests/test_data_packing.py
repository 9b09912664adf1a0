"""Blocks hold every token once, labels leave out what is not learnt, and packed documents do not see each other."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from graftlm.samples import IGNORED
from graftlm.training.data.collate import Collator
from graftlm.training.data.encode import Encoded
from graftlm.training.data.packing import Block, ConversationPacker, TextPacker
from graftlm.training.data.statistics import Counts

lengths_of_documents = st.lists(st.integers(1, 30), min_size=1, max_size=20)


def documents(lengths, supervised=True):
    """Documents of distinct tokens; the later half of each is supervised."""
    start = 0
    for index, length in enumerate(lengths):
        mask = np.arange(length) >= length // 2 if supervised else None
        yield Encoded(np.arange(start, start + length, dtype=np.int32), mask, index)
        start += length


def pack(packer, encoded):
    return [*(block for document in encoded for block in packer.add(document)), *packer.finish()]


@settings(max_examples=60, deadline=None)
@given(lengths_of_documents, st.integers(2, 16), st.booleans())
def test_text_blocks_are_the_stream(lengths, max_length, boundaries):
    blocks = pack(TextPacker(max_length, boundaries=boundaries), documents(lengths, supervised=False))
    total = sum(lengths)
    lost = 1 if total % max_length == 1 else 0  # a last block of one token predicts nothing
    assert np.concatenate([[], *(block.input_ids for block in blocks)]).tolist() == list(range(total - lost))
    assert all(len(block) == max_length for block in blocks[:-1])
    borders = set(np.cumsum([0, *lengths]).tolist())
    for number, block in enumerate(blocks):
        if not boundaries:
            assert block.starts is None
            assert np.flatnonzero(block.labels == IGNORED).tolist() == [0]
            continue
        ids = block.input_ids
        wanted = [i for i in range(len(block)) if i == 0 or int(ids[i]) in borders]
        assert block.starts.tolist() == wanted, number
        assert np.flatnonzero(block.labels == IGNORED).tolist() == wanted
        assert np.flatnonzero(block.position_ids == 0).tolist() == wanted
        assert set(np.diff(block.position_ids)[np.diff(block.position_ids) > 0].tolist()) <= {1}


@settings(max_examples=60, deadline=None)
@given(lengths_of_documents, st.integers(2, 16))
def test_separate_documents_never_share_a_block(lengths, max_length):
    blocks = pack(TextPacker(max_length, separate=True), documents(lengths, supervised=False))
    owner = np.repeat(np.arange(len(lengths)), lengths)
    assert all(len(set(owner[block.input_ids].tolist())) == 1 for block in blocks)
    assert sum(map(len, blocks)) == sum(n - (n % max_length == 1) for n in lengths)


def test_pieces_of_a_document_are_one_document():
    whole = list(documents([20, 7], supervised=False))
    pieces = [
        Encoded(whole[0].input_ids[:9], None, 0, first=True, last=False),
        Encoded(whole[0].input_ids[9:], None, 0, first=False, last=True),
        whole[1],
    ]
    for options in ({"boundaries": True}, {"separate": True}, {}):
        blocks, others = (pack(TextPacker(6, **options), encoded) for encoded in (whole, pieces))
        assert [b.labels.tolist() for b in blocks] == [b.labels.tolist() for b in others]


@settings(max_examples=60, deadline=None)
@given(lengths_of_documents, st.integers(2, 16), st.booleans(), st.booleans())
def test_conversations_stay_whole(lengths, max_length, packing, truncate):
    counts = Counts()
    how = "truncate" if truncate else "drop"
    packer = ConversationPacker(max_length, packing=packing, truncation=how, counts=counts)
    blocks = pack(packer, documents(lengths))
    kept, supervised = {}, 0
    for document in documents(lengths):
        mask = document.supervised[:max_length].copy()
        mask[0] = False
        if mask.any() and (truncate or len(document.input_ids) <= max_length):
            kept[int(document.input_ids[0])] = document.input_ids[:max_length].tolist()
            supervised += int(mask.sum())
    seen = {}
    for block in blocks:
        assert len(block) <= max_length
        assert (block.starts is not None) == packing
        for part in np.split(block.input_ids, block.starts[1:] if packing else []):
            seen[int(part[0])] = part.tolist()
    assert seen == kept
    assert counts.dropped == len(lengths) - len(kept)
    assert sum(block.supervised_tokens for block in blocks) == supervised
    assert counts.truncated_documents == sum(n > max_length and i in kept for i, n in _first_tokens(lengths))


@settings(max_examples=60, deadline=None)
@given(lengths_of_documents, st.integers(2, 16), st.booleans())
def test_long_conversations_go_on_in_further_blocks(lengths, max_length, packing):
    counts = Counts()
    packer = ConversationPacker(max_length, packing=packing, truncation="split", counts=counts)
    seen = [
        part.tolist()
        for block in pack(packer, documents(lengths))
        for part in np.split(block.input_ids, block.starts[1:] if packing else [])
    ]
    wanted, dropped = [], 0
    for document in documents(lengths):
        pieces = [slice(at, at + max_length) for at in range(0, len(document.input_ids), max_length)]
        kept = [piece for piece in pieces if document.supervised[piece][1:].any()]
        wanted += [document.input_ids[piece].tolist() for piece in kept]
        dropped += not kept
    assert sorted(seen) == sorted(wanted)
    assert counts.dropped == dropped and not counts.truncated_tokens


def _first_tokens(lengths):
    return zip(np.cumsum([0, *lengths[:-1]]).tolist(), lengths, strict=True)


def test_best_fit_wastes_little_and_is_deterministic():
    lengths = np.random.default_rng(0).integers(3, 100, size=2000).tolist()

    def packed():
        return pack(ConversationPacker(128, packing=True, truncation="truncate", counts=Counts()), documents(lengths))

    blocks = packed()
    assert sum(lengths) / (128 * len(blocks)) > 0.95
    assert [b.input_ids.tolist() for b in blocks] == [b.input_ids.tolist() for b in packed()]


def test_whole_conversation_supervised_without_mask():
    block = Block(np.arange(5, 9, dtype=np.int32), None, np.asarray([0, 2], np.int32))
    assert block.labels.tolist() == [IGNORED, 6, IGNORED, 8]
    assert block.position_ids.tolist() == [0, 1, 0, 1]


def item(lengths, apart):
    ids = np.arange(1, sum(lengths) + 1, dtype=np.int32)
    starts = np.cumsum([0, *lengths[:-1]]).astype(np.int32)
    return Block(ids, None, starts if apart else None).item()


def test_collator_without_padding_gives_no_mask():
    assert set(Collator(0)([item([4], False), item([4], False)])) == {"input_ids", "labels"}


def test_collator_pads_rows():
    batch = Collator(9)([item([4], False), item([2], False)])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4], [1, 2, 9, 9]]
    assert batch["labels"].tolist() == [[IGNORED, 2, 3, 4], [IGNORED, 2, IGNORED, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


def test_collator_makes_padding_documents_of_one_token():
    batch = Collator(9)([item([2, 3], True), item([2], True)])
    assert "attention_mask" not in batch
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2], [0, 1, 0, 0, 0]]
    assert batch["labels"].tolist()[1] == [IGNORED, 2, IGNORED, IGNORED, IGNORED]


def test_collator_flattens_for_flash_attention():
    batch = Collator(9, flatten=True)([item([2, 3], True), item([2], True)])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 1, 2]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2, 0, 1]]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("flatten", [False, True])
def test_packed_documents_do_not_see_each_other(attention, flatten):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation=attention,
        initializer_range=0.5,  # far from uniform attention, so that a leak would show
    )
    model = LlamaForCausalLM(config).eval()
    rng = np.random.default_rng(0)
    texts = [rng.integers(1, 64, size=n).astype(np.int32) for n in (7, 2, 1, 9, 5)]
    encoded = [Encoded(ids, None, i) for i, ids in enumerate(texts)]
    blocks = pack(TextPacker(19, boundaries=True), encoded)
    assert [len(block) for block in blocks] == [19, 5]  # the second row is padded
    batch = Collator(0, flatten=flatten)([block.item() for block in blocks])
    with torch.no_grad():
        packed = model(**batch, use_cache=False)
        alone = [model(torch.from_numpy(ids.astype(np.int64))[None], use_cache=False).logits[0] for ids in texts]
    logits = packed.logits.reshape(-1, 64)
    rows = torch.cat([logits[:19], logits[19:24]])
    # By as much as processors differ in how they round; a leak shows in whole numbers.
    torch.testing.assert_close(rows, torch.cat(alone), atol=1e-4, rtol=1e-4)
    losses = [
        torch.nn.functional.cross_entropy(out[:-1], torch.from_numpy(ids[1:].astype(np.int64)), reduction="sum")
        for out, ids in zip(alone, texts, strict=True)
    ]
    expected = sum(losses) / sum(len(ids) - 1 for ids in texts)
    torch.testing.assert_close(packed.loss, expected, atol=1e-5, rtol=1e-5)
    # The test can fail: without position_ids the second document does see the first.
    leaking = {key: value for key, value in batch.items() if key != "position_ids"}
    with torch.no_grad():
        leaked = model(**leaking, use_cache=False).logits.reshape(-1, 64)
    assert (leaked[7:9] - alone[1]).abs().max() > 1e-2
