"""Algorithm 1 in plain fp64, the way one would write it down: what the package is held against.

It shares no code with the package: numpy's SVD, hand-written SGD and AdamW, one loop per matrix and pair. Of the two
signs that a pair of singular vectors can have it takes the one that makes the largest entry of u positive.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch


@dataclass
class ReferenceMatrix:
    W: np.ndarray
    B: np.ndarray
    A: np.ndarray
    U: np.ndarray
    sigma: np.ndarray
    Vt: np.ndarray
    next_direction: int
    births: list  # which pairs were drawn last, by pair: the number of its direction
    averages: dict = field(default_factory=dict)
    moments: dict = field(default_factory=dict)
    chosen: list = field(default_factory=list)  # (indices recycled) at every switch
    drawn: dict = field(default_factory=dict)  # by pair: the step after which it was drawn, and s b a^T then
    records: list = field(default_factory=list)  # of every pair before every switch: age, size, score, change


class ReferenceSRLoRA:
    """SRLoRA on the weights ``W0s``, trained on ``loss(effective weights, batch)``.

    ``s`` is the scaling, ``recycled`` is r', ``switch_steps`` the steps after which a switch falls.
    """

    def __init__(
        self,
        W0s,
        rank,
        s,
        recycled,
        switch_steps,
        optimizer,
        reset="all",
        state="warm",
        beta1=0.85,
        beta2=0.85,
        select="importance",
        redraw_scale="sigma",
    ):
        self.select, self.redraw_scale = select, redraw_scale
        self.s, self.recycled, self.switch_steps = s, recycled, switch_steps
        self.optimizer, self.reset, self.state, self.beta1, self.beta2 = optimizer, reset, state, beta1, beta2
        self.matrices, self.step = [], 0
        for W0 in W0s:
            U, sigma, Vt = np.linalg.svd(W0, full_matrices=False)
            for k in range(len(sigma)):
                if U[np.argmax(np.abs(U[:, k])), k] < 0:
                    U[:, k], Vt[k] = -U[:, k], -Vt[k]
            B = U[:, :rank] * np.sqrt(sigma[:rank]) / np.sqrt(s)
            A = (Vt[:rank].T * np.sqrt(sigma[:rank])).T / np.sqrt(s)
            matrix = ReferenceMatrix(W0 - s * B @ A, B, A, U, sigma, Vt, rank, list(range(rank)))
            matrix.drawn = {k: (0, s * np.outer(B[:, k], A[k])) for k in range(rank)}
            for name, value in (("B", B), ("A", A)):
                matrix.averages[name] = [np.zeros_like(value), np.zeros_like(value)]
                matrix.moments[name] = [np.zeros_like(value), np.zeros_like(value)]
            self.matrices.append(matrix)

    def effective(self) -> list[np.ndarray]:
        return [m.W + self.s * m.B @ m.A for m in self.matrices]

    def pair_scores(self, m: ReferenceMatrix) -> np.ndarray:
        score = {name: smooth * uncertain for name, (smooth, uncertain) in m.averages.items()}
        return np.array([score["B"][:, k].mean() + score["A"][k, :].mean() for k in range(m.B.shape[1])])

    def train_step(self, loss: Callable, batch) -> None:
        self.step += 1
        weights = [torch.tensor(W, requires_grad=True) for W in self.effective()]
        gradients = [g.numpy() for g in torch.autograd.grad(loss(weights, batch), weights)]
        for m, G in zip(self.matrices, gradients, strict=True):
            grads = {"B": self.s * G @ m.A.T, "A": self.s * m.B.T @ G}
            for name in ("B", "A"):
                w = getattr(m, name)
                sensitivity = np.abs(w * grads[name])
                smooth, uncertain = m.averages[name]
                smooth = self.beta1 * smooth + (1 - self.beta1) * sensitivity
                uncertain = self.beta2 * uncertain + (1 - self.beta2) * np.abs(sensitivity - smooth)
                m.averages[name] = [smooth, uncertain]
            for name in ("B", "A"):
                setattr(m, name, self.update(m, name, grads[name]))
        if self.step in self.switch_steps:
            for m in self.matrices:
                self.switch(m)

    def update(self, m: ReferenceMatrix, name: str, g: np.ndarray) -> np.ndarray:
        w, o, moments = getattr(m, name), self.optimizer, m.moments[name]
        if o["name"] == "sgd":
            moments[0] = o["momentum"] * moments[0] + g if self.step > 1 else g.copy()
            return w - o["lr"] * moments[0]
        b1, b2 = o["betas"]
        moments[0] = b1 * moments[0] + (1 - b1) * g
        moments[1] = b2 * moments[1] + (1 - b2) * g**2
        m_hat, v_hat = moments[0] / (1 - b1**self.step), moments[1] / (1 - b2**self.step)
        return w * (1 - o["lr"] * o["weight_decay"]) - o["lr"] * m_hat / (np.sqrt(v_hat) + o["eps"])

    def switch(self, m: ReferenceMatrix) -> None:
        scores = self.pair_scores(m) if self.select == "importance" else m.births
        sizes = [self.s * np.linalg.norm(m.B[:, k]) * np.linalg.norm(m.A[k]) for k in range(len(scores))]
        median = sorted(sizes)[(len(sizes) - 1) // 2]
        low = sorted(sorted(range(len(scores)), key=lambda k: (scores[k], k))[: self.recycled])
        m.chosen.append(low)
        record = []
        for k, (step, then) in sorted(m.drawn.items()):
            score = scores[k] if self.select == "importance" else 0
            change = np.linalg.norm(self.s * np.outer(m.B[:, k], m.A[k]) - then)
            record.append((self.step - step, np.linalg.norm(then), score, change))
        m.records.append(record)
        for offset, k in enumerate(low):
            p = m.next_direction + offset
            old_b, old_a = m.B[:, k].copy(), m.A[k].copy()
            m.W = m.W + self.s * np.outer(old_b, old_a)
            size = m.sigma[p] if self.redraw_scale == "sigma" else median
            m.B[:, k] = m.U[:, p] * np.sqrt(size) / np.sqrt(self.s)
            m.A[k] = m.Vt[p] * np.sqrt(size) / np.sqrt(self.s)
            m.births[k] = p
            m.W = m.W - self.s * np.outer(m.B[:, k], m.A[k])
            m.drawn[k] = self.step, self.s * np.outer(m.B[:, k], m.A[k])
            if self.state != "keep":
                m.moments["B"][0][:, k] = 0
                m.moments["A"][0][k] = 0
                warm = self.state == "warm"
                m.moments["B"][1][:, k] *= (m.A[k] @ m.A[k]) / (old_a @ old_a) if warm else 0
                m.moments["A"][1][k] *= (m.B[:, k] @ m.B[:, k]) / (old_b @ old_b) if warm else 0
            if self.reset == "recycled":
                for average in m.averages["B"]:
                    average[:, k] = 0
                for average in m.averages["A"]:
                    average[k] = 0
        if self.reset == "all":
            for name in ("B", "A"):
                m.averages[name] = [np.zeros_like(a) for a in m.averages[name]]
        m.next_direction += self.recycled
