"""S2L: a choice of the examples by the losses of a small model."""

import warnings

import numpy as np

from sftmix.components.base import Selector
from sftmix.components.component import require
from sftmix.disk.places import place_of
from sftmix.disk.tables import existing_file, read_dynamics
from sftmix.ranks.rng import generator
from sftmix.types import Rows, Scores


class S2L(Selector):
    """S2L (arXiv 2403.07384): examples spread evenly over clusters of loss trajectories of a small reference.

    The trajectory of an example is its mean NLL at each checkpoint of an earlier run. From the smallest cluster on,
    each gives an equal part of what is still to be chosen, or all that it has. Examples without a trajectory are not
    selected. The authors' code first divides k among the sources of a mixture; this class does not.
    """

    def __init__(self, *, k: int, dynamics: str, clusters: int = 100):
        """
        k: number of examples to keep.
        dynamics: a dynamics.parquet of the same rows, for instance of `sftmix confidence` with a small model.
        clusters: number of clusters of k-means, at least 1.
        """
        require(clusters >= 1, "selector.clusters", clusters, "1 and above")
        self.k, self.dynamics, self.clusters = k, dynamics, clusters

    def files(self) -> list[str]:
        return [existing_file("selector.dynamics", self.dynamics)]

    def select(self, scores: Scores, *, seed: int) -> Rows:
        from scipy.cluster.vq import kmeans2

        dynamics = read_dynamics(place_of(self.dynamics)).of(scores.id)
        # By id, so that the choice does not depend on the order of the file.
        rows = np.array(
            sorted(np.flatnonzero(dynamics.scored).tolist(), key=lambda row: scores.id[row]), dtype=np.int64
        )
        allowed = f"from 1 to {len(rows)}, the examples with a trajectory in selector.dynamics {self.dynamics}"
        require(1 <= self.k <= len(rows), "selector.k", self.k, allowed)
        rng = generator(seed, "s2l")
        with warnings.catch_warnings(action="ignore"):  # an empty cluster gives nothing
            _, cluster = kmeans2(dynamics.mean_nll[rows], min(self.clusters, len(rows)), minit="++", seed=rng)
        members = sorted((rng.permutation(rows[cluster == number]) for number in np.unique(cluster)), key=len)
        chosen: list[int] = []
        for place, of_cluster in enumerate(members):
            # k = 7 of clusters with 1, 3 and 9 members: 1, 3 and 3
            chosen.extend(of_cluster[: (self.k - len(chosen)) // (len(members) - place)])
        return np.sort(chosen)
