import pytest
import torch

from postformer.data import VOCAB, decode, encode
from postformer.data.codec import decode_bytes


def test_text_becomes_its_utf8_bytes_and_back():
    tokens = encode("aé\n")
    assert tokens.tolist() == [97, 0xC3, 0xA9, 10]
    assert tokens.dtype == torch.int64
    assert decode(tokens) == "aé\n"
    assert VOCAB == 256


def test_every_byte_round_trips():
    raw = bytes(range(256))
    assert decode_bytes(encode(raw)) == raw
    assert encode(decode(encode(raw), errors="surrogateescape")).tolist() == list(raw)


def test_nothing_is_nothing():
    assert encode("").shape == (0,)
    assert decode(encode("")) == ""


def test_a_cut_character_is_replaced_unless_asked_otherwise():
    tokens = encode("é")[:1]
    assert decode(tokens) == "�"
    with pytest.raises(UnicodeDecodeError):
        decode(tokens, errors="strict")


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.tensor([1, 256]), "not all bytes"),
        (torch.tensor([-1]), "not all bytes"),
        (torch.zeros(2, 3, dtype=torch.long), "one row"),
        (torch.zeros(3), "integer"),
    ],
)
def test_what_is_not_bytes_is_refused(tokens, message):
    with pytest.raises(ValueError, match=message):
        decode(tokens)
