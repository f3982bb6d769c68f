import pytest
import torch

torch.set_num_threads(1)

WRONG = """version: 1
name: wrong
model:
  width: 64
  mixers:
    memory:
      kind: matrix
      loss: l2
      features: l2norm
      retention: {per: head, gate: mamba}
      update: {kind: gradient, rate: sigmoid}
      heads:
        value: 4
        dim_key: 16
        dim_value: 16
    attention: {kind: attention, heads: {query: 4, key_value: 2}}
    lru: {kind: vector, parameterisation: hgrn}
    feedforward: {kind: swiglu}
  layers:
    m: [{use: memory}, {use: feedforward}]
    l:
      - use: lru
        residual: add
      - use: feedforward
  stack:
    - m
    - {repeat: 2, of: [l, attention/feedforward]}
"""


@pytest.fixture
def recipe_file(tmp_path):
    """write(old, new, ...) -> path of a valid recipe with texts replaced."""
    def write(*changes: str) -> str:
        text = WRONG
        for old, new in zip(changes[::2], changes[1::2], strict=True):
            assert old in text
            text = text.replace(old, new, 1)
        path = tmp_path / "wrong.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)
    return write
