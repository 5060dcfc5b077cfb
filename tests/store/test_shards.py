from __future__ import annotations

import random

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import BloscCodec, Crc32cCodec

from ldct_dist.ct.volume import AIR_HU, Volume
from ldct_dist.errors import UserError
from ldct_dist.store import layout
from ldct_dist.store.reader import Store
from ldct_dist.store.record import array_metadata
from ldct_dist.store.shards import LEVEL, write_shards
from stores import SPACING, make_store, smooth_volume

SHAPE = (33, 40, 50)
RANDOM = random.Random(0)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A case of many chunks, some of which are not stored since they are all air."""
    path = tmp_path_factory.mktemp("shards") / "ct.zarr"
    hu = smooth_volume(SHAPE, seed=0)
    hu[:8] = AIR_HU
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "CHUNK", (8, 16, 24))
        patch.setattr(layout, "SHARD_CAP", 2 * 2 * 7 * 42 * 51)  # two layers of chunks a shard
        layout.create(path)
        layout.write_case(path, "case", {1.0: Volume(hu, SPACING)}, patient="p", split="train")
    layout.finalise(path)
    return Store(path)


def slices(size):
    edges = st.tuples(st.integers(0, size), st.integers(0, size)).filter(lambda e: e[0] != e[1])
    return edges.map(lambda e: slice(min(e), max(e)))


@settings(deadline=None, max_examples=100, derandomize=True)
@given(region=st.tuples(*map(slices, SHAPE)))
def test_any_region_reads_as_zarr_reads_it(store, region):
    array = zarr.open_array(store.path / "cases/case/1.00")
    assert array.shards[0] < SHAPE[0]  # several shards
    assert np.array_equal(store.read("case", "1.00", region), array[region])


def test_a_region_is_read_into_memory_that_is_given(store):
    out = np.zeros((5, 40, 9), np.int16)
    region = (slice(20, 25), slice(0, 40), slice(30, 39))
    assert store.read("case", "1.00", region, out) is out
    assert np.array_equal(out, smooth_volume(SHAPE, seed=0)[region])


@pytest.mark.parametrize("file", ["c/0/0/0", "zarr.json"])
def test_a_flipped_bit_is_found_or_makes_no_difference(tmp_path, file):
    store = make_store(tmp_path / "ct.zarr", [(12, 20, 20)])
    path = store.path / "cases/case-000/0.25" / file
    whole, good = tuple(slice(0, n) for n in (12, 20, 20)), path.read_bytes()
    expected = store.read("case-000", "0.25", whole)
    found = 0
    for _ in range(200):
        raw = bytearray(good)
        raw[RANDOM.randrange(len(raw))] ^= 1 << RANDOM.randrange(8)
        path.write_bytes(raw)
        try:
            assert np.array_equal(Store(store.path).read("case-000", "0.25", whole), expected)
        except UserError as e:
            assert "case case-000 at dose 0.25 is damaged" in str(e)  # noqa: PT017
            found += 1
    assert found == 200 if file == "c/0/0/0" else found > 50


@pytest.mark.parametrize("length", [0, 3, 30, 1000])
def test_a_truncated_shard_is_found(tmp_path, length):
    store = make_store(tmp_path / "ct.zarr", [(12, 20, 20)])
    shard = store.path / "cases/case-000/1.00/c/0/0/0"
    shard.write_bytes(shard.read_bytes()[:length])
    with pytest.raises(UserError, match=r"case case-000 at dose 1\.00 is damaged"):
        store.volume("case-000", "1.00")


def test_a_lost_shard_is_not_taken_for_air(tmp_path):
    store = make_store(tmp_path / "ct.zarr", [(12, 20, 20)])
    (store.path / "cases/case-000/1.00/c/0/0/0").unlink()
    with pytest.raises(UserError, match=r"case case-000 at dose 1\.00 cannot be read.*No such file"):
        store.volume("case-000", "1.00")


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_shards_are_the_bytes_that_zarr_writes(tmp_path, layers):
    chunk, (z, y, x) = (8, 16, 24), SHAPE
    hu = smooth_volume(SHAPE, seed=0)
    hu[:8, 16:32] = AIR_HU
    shards = (layers * chunk[0], -(-y // 16) * 16, -(-x // 24) * 24)
    array = zarr.create_array(
        tmp_path / "zarr",
        shape=SHAPE,
        dtype="int16",
        chunks=chunk,
        shards=shards,
        compressors=[BloscCodec(cname="lz4", clevel=LEVEL, shuffle="bitshuffle", typesize=2), Crc32cCodec()],
        fill_value=AIR_HU,
        dimension_names=("z", "y", "x"),
    )
    array[:] = hu
    ours = tmp_path / "ours"
    ours.mkdir()
    write_shards(ours, hu, chunk, layers)
    (ours / "zarr.json").write_bytes(array_metadata(SHAPE, chunk, shards))
    written = [
        {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}
        for root in (ours, tmp_path / "zarr")
    ]
    assert written[0] == written[1]
    assert len(written[0]) == 1 + -(-z // shards[0])


def test_a_volume_of_air_has_shards_all_the_same(tmp_path):
    volume = Volume(np.full((9, 20, 20), AIR_HU, np.int16), SPACING)
    layout.create(tmp_path / "s")
    layout.write_case(tmp_path / "s", "air", {1.0: volume}, patient="p", split="train")
    layout.finalise(tmp_path / "s")
    assert (Store(tmp_path / "s").volume("air", "1.00").hu == AIR_HU).all()
    assert (zarr.open_array(tmp_path / "s/cases/air/1.00")[:] == AIR_HU).all()
