"""What is recorded of a training when its model is saved."""

from __future__ import annotations

from ldm.data.batches import PositionDataset
from ldm.provenance import Provenance, hardware, versions
from ldm.training.progress import Progress


def provenance(progress: Progress, train: PositionDataset) -> Provenance:
    """Return the record of a training that stands at `progress`, on the split `train`."""
    return Provenance(
        data=train.images.source.fingerprint,
        held_out_hash=train.images.splits.held_out_hash,
        train_pictures=len(train),
        global_step=progress.global_step,
        train_seconds=round(progress.train_seconds, 1),
        images_per_second=round(progress.images_per_second, 1),
        hardware=hardware(),
        versions=versions(),
    )
