"""The checkpoint that ships with the package."""

import pytest
import torch

from ep_runtime.lm import checkpoint, train

# Opening of a novel that no source of the corpus contains (Charles Dickens, 1859; public domain).
ENGLISH = (
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the "
    "age of foolishness, it was the epoch of belief, it was the epoch of incredulity, it was "
    "the season of Light, it was the season of Darkness, it was the spring of hope, it was the "
    "winter of despair, we had everything before us, we had nothing before us, we were all "
    "going direct to Heaven, we were all going direct the other way--in short, the period was "
    "so far like the present period, that some of its noisiest authorities insisted on its "
    "being received."
)


@pytest.fixture(scope="module")
def packaged() -> checkpoint.Checkpoint:
    return checkpoint.load()


def bits_per_byte(model: checkpoint.Checkpoint, text: str) -> float:
    data = torch.tensor(list(text.encode()), dtype=torch.uint8)
    padded = data[: model.config.max_context]
    assert padded.numel() == model.config.max_context
    return train.bits_per_byte(model.reference(), padded, batch=1)


def test_is_small_and_of_the_shape_that_the_issue_names(packaged: checkpoint.Checkpoint) -> None:
    assert checkpoint.PACKAGED.stat().st_size <= 12_000_000
    c = packaged.config
    assert (c.layers, c.hidden, c.num_experts, c.topk) == (4, 256, 16, 4)


def test_says_where_it_comes_from(packaged: checkpoint.Checkpoint) -> None:
    sources = packaged.training["corpus"]["sources"]
    assert len(sources) >= 3
    assert all(s["name"] and s["licence"] and s["packages"] and s["train_bytes"] for s in sources)
    assert 1.0 < packaged.training["val_bits_per_byte"] < 2.5
    assert packaged.training["val_windows"] > 1000
    assert packaged.training["steps"] > 0


def test_knows_english(packaged: checkpoint.Checkpoint) -> None:
    """Prose it never saw costs little, the same letters in another order cost a lot."""
    order = torch.randperm(len(ENGLISH), generator=torch.Generator().manual_seed(1)).tolist()
    shuffled = "".join(ENGLISH[i] for i in order)
    assert bits_per_byte(packaged, ENGLISH) < 2.8
    assert bits_per_byte(packaged, shuffled) > 5


def test_all_experts_are_used(packaged: checkpoint.Checkpoint) -> None:
    model = packaged.reference()
    tokens = torch.tensor([list(ENGLISH.encode())[:512]])
    _, balance = model(tokens)
    assert balance.item() < 3, "a few experts take most tokens: the ranks would not share the work"
