from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from ldct_dist.checkpoint import pieces
from ldct_dist.checkpoint.pieces import Part, Piece, _File, write
from ldct_dist.files import file_sha256
from ldct_dist.models.weights import sealed
from ldct_dist.world import World

DRAW = torch.Generator().manual_seed(0)
TENSORS = {
    "w": torch.randn(4, 3, generator=DRAW),
    "count": torch.arange(7),
    "z.fine": torch.randn(3, generator=DRAW).double(),
    "a.coarse": torch.randn(1, 3, generator=DRAW).bfloat16(),
}


def test_a_file_is_byte_for_byte_what_safetensors_writes(tmp_path):
    held = {"ours": {key: Piece(tuple(t.shape), 0, t.reshape(-1)) for key, t in TENSORS.items()}}
    written = write(tmp_path, {"ours": Part(TENSORS)}, {"ours": 0}, held, World(), None)
    save_file(TENSORS, tmp_path / "theirs")
    ours = (tmp_path / "ours").read_bytes()
    assert ours == (tmp_path / "theirs").read_bytes()
    assert written == {"ours": (len(ours), file_sha256(tmp_path / "ours"))}


def test_ranks_hear_of_no_piece_that_is_empty(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(World, "gather", lambda self, item, group: told.append(item) or [item])
    held = {"w": Piece((2,), 0, torch.ones(2)), "elsewhere": Piece((0,), 0, torch.empty(0))}
    parts = {"ours": Part({key: torch.empty(piece.shape) for key, piece in held.items()})}
    write(tmp_path, parts, {"ours": 0}, {"ours": held}, World(), None)
    assert told == [{"ours": {"w": (0, 2)}}]


def test_a_piece_of_another_rank_that_takes_several_messages_arrives_whole(tmp_path, monkeypatch):
    """The rest of a large tensor is on rank 1, the file is rank 0's."""
    sent = []
    monkeypatch.setattr(pieces, "CHUNK", 5)
    monkeypatch.setattr(dist, "send", lambda values, to, group: sent.append(values.clone()))
    monkeypatch.setattr(dist, "recv", lambda chunk, holder, group: chunk.copy_(sent.pop(0)))
    w = torch.arange(20.0)
    held = [{"w": Piece((20,), 0, w[:3])}, {"w": Piece((20,), 3, w[3:])}]
    told = [{"ours": {"w": (0, 3)}}, {"ours": {"w": (3, 17)}}]
    for rank in (1, 0):
        world = SimpleNamespace(rank=rank, gather=lambda item, group: told)
        write(tmp_path, {"ours": Part({"w": w})}, {"ours": 0}, {"ours": held[rank]}, world, None)
    assert torch.equal(load_file(tmp_path / "ours")["w"], w)


def test_pieces_in_any_order_make_the_same_sealed_file(tmp_path):
    facts = {"kind": "test"}
    file = _File(tmp_path / "ours", Part(TENSORS, facts))
    cuts = [(key, start) for key, t in TENSORS.items() for start in range(0, t.numel(), 2)]
    for key, start in reversed(cuts):
        file.put(key, start, TENSORS[key].reshape(-1)[start : start + 2])
    size, _ = file.close()
    save_file(TENSORS, tmp_path / "theirs", metadata=(seal := sealed(facts, TENSORS)))
    theirs = (tmp_path / "theirs").read_bytes()
    ours = (tmp_path / "ours").read_bytes()
    assert size == len(ours) == len(theirs)
    assert seal["sha256"].encode() in ours
    header = 8 + int.from_bytes(ours[:8], "little")
    assert ours[header:] == theirs[header:]


def test_a_disk_that_fills_up_is_told_once_all_pieces_were_taken(tmp_path):
    (tmp_path / "ours").mkdir()  # where a file cannot be
    file = _File(tmp_path / "ours", Part(TENSORS, {"kind": "test"}))
    for key, tensor in TENSORS.items():
        file.put(key, 0, tensor.reshape(-1))
    with pytest.raises(OSError, match="File exists"):
        file.close()
