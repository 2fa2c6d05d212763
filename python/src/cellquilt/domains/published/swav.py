"""The training objective: two views of a place shall be given the same prototypes.

Swapped assignments between views (Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster
Assignments", NeurIPS 2020), with prototypes that a slide may leave unused (Blampey et al., Nature Methods 2025).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

#: Weight of the entropy in the assignment problem, and steps of its solution.
_EPSILON, _STEPS = 0.05, 3
TEMPERATURE = 0.1
#: The queue keeps so many steps of a slide, and of each the third largest similarity: less chance than in the largest.
_QUEUE, _RANK = 2, 3
#: A slide uses prototypes about as near to its cells as to those of the slide that is nearest.
_AS_NEAR = 0.99


@torch.no_grad()
def sinkhorn(similarity: Tensor) -> Tensor:
    """Assignments that give every prototype the same weight in a batch.

    Solves ``argmax_Q Tr(Q S) + ε H(Q)`` over Q whose columns have equal sums, by alternating normalisation.

    Parameters
    ----------
    similarity
        (n, n_prototypes) cosines.

    Returns
    -------
    torch.Tensor
        (n, n_prototypes); rows add up to 1.
    """
    # What is added to a row or a column does not matter: the largest is taken off, so that nothing overflows.
    q = torch.exp((similarity - similarity.max()) / _EPSILON)
    for _ in range(_STEPS):
        q = q / q.sum(dim=0, keepdim=True).clamp_min(1e-30)
        q = q / q.sum(dim=1, keepdim=True).clamp_min(1e-30)
    return q


def swav_loss(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Each view is to predict the assignments of the other.

    Parameters
    ----------
    first, second
        (n, n_prototypes) cosines of the latents of two views of each place with the prototypes.

    Returns
    -------
    loss, entropy
        Numbers; the entropy is that of the first view's assignments over its largest possible value: 1 where nothing is
        told apart.
    """
    q1, q2 = sinkhorn(first), sinkhorn(second)
    p1, p2 = F.log_softmax(first / TEMPERATURE, dim=1), F.log_softmax(second / TEMPERATURE, dim=1)
    loss = -0.5 * ((q1 * p2).sum(dim=1).mean() + (q2 * p1).sum(dim=1).mean())
    entropy = -(q1 * torch.log(q1 + 1e-8)).sum(dim=1).mean() / torch.log(torch.tensor(float(q1.shape[1])))
    return loss, entropy


class SlideQueue:
    """Which prototypes each slide uses, by how near its cells came to them lately.

    Parameters
    ----------
    n_slides, n_prototypes
        How many.
    least
        Share of the prototypes that every slide uses at least.
    """

    def __init__(self, n_slides: int, n_prototypes: int, least: float) -> None:
        self.seen = torch.full((n_slides, _QUEUE, n_prototypes), 1.0 / n_prototypes)
        self.least = max(int(least * n_prototypes), min(2, n_prototypes))

    @torch.no_grad()
    def prototypes_of(self, slide: int, similarity: Tensor) -> Tensor:
        """Note a batch of a slide, and tell which prototypes the slide uses.

        Parameters
        ----------
        slide
            Its number.
        similarity
            (n, n_prototypes) cosines of the batch.

        Returns
        -------
        torch.Tensor
            Numbers of the prototypes, ascending.
        """
        rank = min(_RANK, similarity.shape[0])
        self.seen[slide, 1:] = self.seen[slide, :-1].clone()
        self.seen[slide, 0] = similarity.topk(rank, dim=0).values[-1].to(self.seen)
        weights = self.seen.max(dim=1).values
        nearest = weights.max(dim=0).values
        own = weights[slide]
        used = own >= nearest * _AS_NEAR - (1 - _AS_NEAR)
        if int(used.sum()) < self.least:
            others = torch.where(used, -torch.inf, own)
            used[others.topk(self.least - int(used.sum())).indices] = True
        return torch.where(used)[0].to(similarity.device)
