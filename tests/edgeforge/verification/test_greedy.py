"""Greedy text of an artifact against what its references would have chosen."""

from __future__ import annotations

import numpy as np
import torch

from edgeforge.verification.greedy import GreedyAgreement, greedy_agreement, greedy_prompts


class Table:
    """A model that knows only the last token: its logits are a row of a table."""

    context, vocab_size, runtime = 12, 5, "a table"

    def __init__(self, table: np.ndarray) -> None:
        self.table = table.astype(np.float32)
        self.calls: list[int] = []

    def reset(self) -> None:
        self.calls.append(0)

    def extend(self, tokens: np.ndarray) -> np.ndarray:
        self.calls.append(len(tokens))
        return self.table[tokens[-1]]

    def logits(self, tokens, choices=None):
        if isinstance(tokens, np.ndarray):
            return self.table[tokens]
        return (torch.from_numpy(self.table[block.numpy()]) for block in tokens)


def successor(*after: int) -> np.ndarray:
    """A table in which each token is followed by the one given."""
    return 9 * np.eye(5)[list(after)]


def test_greedy_agreement_counts_tokens_before_the_first_difference():
    artifact = Table(successor(1, 2, 3, 4, 0))
    same, other = Table(successor(1, 2, 3, 4, 0)), Table(successor(1, 2, 3, 0, 0))
    prompts, seen = [[0], [3], [0, 1]], []
    (found,) = greedy_agreement(
        prompts, [artifact], [same, other], lambda done, size: seen.append((done, size))
    )
    assert seen == [(0, 3), (1, 3), (2, 3)]
    # Contexts of 12 leave 11, 11 and 10 tokens; the other differs after the token 3.
    assert found[0] == GreedyAgreement(3, 11, (11 + 11 + 10) / 3)
    # There the other found its own choice 9 nats likelier.
    assert found[1] == GreedyAgreement(
        3, 11, (3 + 0 + 2) / 3, worst_gap=9.0, worst="token 4 of greedy text 0"
    )
    # As an app runs it: the prompt at once, then token by token.
    assert artifact.calls[:4] == [0, 1, 1, 1] and artifact.calls.count(2) == 1


def test_each_artifact_has_its_own_agreements():
    right, wrong = Table(successor(1, 2, 3, 4, 0)), Table(successor(1, 2, 4, 4, 0))
    reference = Table(successor(1, 2, 3, 4, 0))
    found = greedy_agreement([[0], [3]], [right, wrong], [reference], lambda done, size: None)
    worst = {"worst_gap": 9.0, "worst": "token 3 of greedy text 0"}
    assert found == [[GreedyAgreement(2, 11, 11)], [GreedyAgreement(2, 11, (2 + 4) / 2, **worst)]]


def test_prompts_are_spread_over_the_text():
    blocks = [list(range(100 * i, 100 * i + 50)) for i in range(20)]
    prompts = greedy_prompts(blocks, 8, 1024)
    assert [prompt[0] for prompt in prompts] == [100 * i for i in range(0, 16, 2)]
    assert all(len(prompt) == 16 for prompt in prompts)
    assert all(len(prompt) == 4 for prompt in greedy_prompts(blocks, 8, 8))
    assert len(greedy_prompts(blocks[:3], 8, 1024)) == 3


def test_steps_that_are_not_finite_are_counted():
    broken = successor(1, 2, 3, 4, 0)
    broken[2, 0] = np.nan
    artifact, same = Table(broken), Table(successor(1, 2, 3, 4, 0))
    (found,) = greedy_agreement([[1]], [artifact], [same], lambda done, size: None)
    # 1, 2, and then NaN counts as the likeliest, so the text goes on 0, 1, 2.
    assert found[0].not_finite == 4
    assert found[0].tokens == 11
