"""The held-out retrieval metric, written out once so that nobody has to guess.

Gallery: every *distinct* image of the data set, training images included. A generated image is
right (R@1) if the nearest image of the gallery is its caption's own. Distance: root mean squared RGB
difference after area-averaging to 16x16, the smallest over shifts of the generated image by up to 3 px
(white border) at 64 px. Copying a training image scores 0: the copy is nearest to what it copied. Colour
(skin tone) and shape both count. Ties count as misses.

    ranks = retrieval_ranks(generated, gallery, own_index)     # 0 = right
    recall(ranks, 1), recall(ranks, 5), bootstrap_interval(ranks, 1)
"""

import numpy as np

SHIFTS = range(-3, 4)


def coarse(images: np.ndarray) -> np.ndarray:
    """(N, 64, 64, 3) uint8 -> (N, 768) float32 in [0, 1], area-averaged to 16x16."""
    n = len(images)
    return (images.reshape(n, 16, 4, 16, 4, 3).mean((2, 4)) / 255).reshape(n, -1).astype(np.float32)


def retrieval_ranks(generated: np.ndarray, gallery: np.ndarray, own_index: np.ndarray) -> np.ndarray:
    """generated (N, 64, 64, 3), gallery (M, 64, 64, 3) uint8, own_index (N,) -> (N,) ranks, 0 is best."""
    keys = coarse(gallery)
    best = np.full((len(generated), len(gallery)), np.inf, np.float32)
    padded = np.pad(generated, ((0, 0), (3, 3), (3, 3), (0, 0)), constant_values=255)
    for dy in SHIFTS:
        for dx in SHIFTS:
            query = coarse(padded[:, 3 + dy : 67 + dy, 3 + dx : 67 + dx])
            squared = (query**2).sum(1)[:, None] + (keys**2).sum(1)[None] - 2 * query @ keys.T
            best = np.minimum(best, squared)
    own = best[np.arange(len(generated)), own_index][:, None]
    return (best <= own).sum(1) - 1


def recall(ranks: np.ndarray, k: int) -> float:
    return float((ranks < k).mean())


def bootstrap_interval(ranks: np.ndarray, k: int, draws: int = 10_000, seed: int = 0) -> tuple[float, float]:
    rng = np.random.default_rng(seed)
    means = (ranks < k)[rng.integers(len(ranks), size=(draws, len(ranks)))].mean(1)
    return tuple(np.quantile(means, [0.025, 0.975]))
