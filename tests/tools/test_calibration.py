"""Every kind of calibration data gives batches a model takes; what can't be read is refused in words."""

import json

import numpy
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from rewright.ir.errors import InputFileError, UsageError
from rewright.tools.calibration import calibration


def test_any_iterable_and_a_limit():
    assert [b.item() for b in calibration((torch.tensor(i) for i in range(100)), most=3)] == [0, 1, 2]


def test_a_data_loader_with_a_transform():
    data = TensorDataset(torch.arange(10.0)[:, None], torch.zeros(10))
    batches = calibration(DataLoader(data, batch_size=4), transform=lambda item: {"x": item[0]})
    assert [tuple(b["x"].shape) for b in batches] == [(4, 1), (4, 1), (2, 1)]


def test_npz_has_a_leading_axis_of_batches(tmp_path):
    numpy.savez(tmp_path / "c.npz", x=numpy.arange(12.0).reshape(3, 2, 2))
    batches = calibration(tmp_path / "c.npz")
    assert len(batches) == 3 and batches[1]["x"].tolist() == [[4.0, 5.0], [6.0, 7.0]]


def test_jsonl_examples_of_one_shape_share_a_batch(tmp_path):
    rows = [{"ids": [1, 2]}, {"ids": [3, 4]}, {"ids": [5, 6, 7]}, {"ids": [8, 9]}]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [b["ids"].tolist() for b in calibration(tmp_path / "c.jsonl")] == [[[1, 2], [3, 4]], [[5, 6, 7]], [[8, 9]]]


@pytest.fixture(scope="module")
def tokenizer():
    """Words of one letter each, with and without a padding token."""
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[PAD]": 0, "a": 1, "b": 2, "c": 3}, unk_token="[PAD]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return lambda **options: PreTrainedTokenizerFast(tokenizer_object=words, **options)


@pytest.mark.parametrize("name", ["c.txt", "c.jsonl"])
def test_texts_are_padded_and_masked(tmp_path, tokenizer, name):
    texts = ["a b c", "", "b", "c c"]
    (tmp_path / name).write_text("\n".join(texts if name == "c.txt" else [json.dumps({"text": t}) for t in texts]))
    batches = calibration(tmp_path / name, tokenizer=tokenizer(pad_token="[PAD]"), batch=2)
    assert [b["input_ids"].tolist() for b in batches] == [[[1, 2, 3], [2, 0, 0]], [[3, 3]]]
    assert batches[0]["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_a_language_models_text_is_cut_into_windows(tmp_path, tokenizer):
    (tmp_path / "c.txt").write_text("a b c\na b c a\n")
    batches = calibration(tmp_path / "c.txt", tokenizer=tokenizer(), batch=2, length=2)
    assert [b["input_ids"].tolist() for b in batches] == [[[1, 2], [3, 1]], [[2, 3]]]


@pytest.mark.parametrize(
    ("name", "text", "error", "said"),
    [
        ("c.csv", "1,2", UsageError, "expected .npz, .jsonl, .txt"),
        ("c.txt", "some text", UsageError, "give the model's tokenizer"),
        ("c.jsonl", "{not json", InputFileError, "line 1 is not JSON"),
        ("c.jsonl", "[1]", InputFileError, "line 1 is not an object"),
        ("c.jsonl", '{"x": ["a"]}', InputFileError, "example 1 is not numbers"),
        ("c.jsonl", "", InputFileError, "is empty"),
        ("c.npz", "no zip", InputFileError, "not a readable .npz"),
    ],
)
def test_what_cannot_be_read_is_refused_in_words(tmp_path, name, text, error, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(error, match=said):
        calibration(tmp_path / name)


def test_one_batch_by_itself_is_no_data():
    with pytest.raises(UsageError, match="put it in a list"):
        calibration({"x": torch.ones(1)})


def test_a_missing_tokenizer_folder_is_named(tmp_path):
    (tmp_path / "c.txt").write_text("a")
    with pytest.raises(InputFileError, match="is not a tokenizer"):
        calibration(tmp_path / "c.txt", tokenizer=str(tmp_path / "nowhere"))
