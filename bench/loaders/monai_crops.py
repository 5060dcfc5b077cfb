"""MONAI's caching data sets with RandSpatialCropSamplesd: eight crops of one case at a time, its fastest way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from loaders import volumes


def batches(cache: Path, crop: tuple[int, int, int], threads: int, kind: str) -> Iterator:
    from monai.data import CacheDataset, DataLoader, PersistentDataset, set_track_meta
    from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, RandSpatialCropSamplesd

    set_track_meta(False)  # nobody here asks where a crop came from: without it MONAI is faster
    keys = ["low", "full"]
    transform = Compose(
        [
            LoadImaged(keys, image_only=True),
            EnsureChannelFirstd(keys, channel_dim="no_channel"),
            RandSpatialCropSamplesd(keys, crop, num_samples=8, random_size=False),
        ]
    )
    if kind == "cache":
        data = CacheDataset(volumes.arrays(cache), transform, num_workers=threads, progress=False)
    else:
        data = PersistentDataset(volumes.arrays(cache), transform, cache_dir=cache / "monai")
        for i in range(len(data)):
            data[i]  # fills the cache
    loader = DataLoader(data, batch_size=1, shuffle=True, num_workers=threads, persistent_workers=True)
    while True:
        for batch in loader:
            low, full = (torch.as_tensor(batch[k]) for k in keys)
            assert low.dtype == torch.float32, low.dtype
            yield low, full, batch["case"]
