"""The nn.Module drop-ins over scores."""

from __future__ import annotations

import torch

from mmkd import losses, ops, reference


def test_modules_compute_their_formulas_and_pass_gradients():
    pos, neg, teacher = (torch.randn(12, requires_grad=True) for _ in range(3))
    cases = [
        (losses.BPRLoss()(pos, neg), reference.bpr(pos - neg), (pos, neg)),
        (
            losses.PairKDLoss(2.0, "positive")(pos - neg, teacher),
            reference.pair_kd(pos - neg, teacher, 2.0, "positive"),
            (pos, teacher),
        ),
    ]
    student, logits = torch.randn(6, 5, requires_grad=True), torch.randn(2, 6, 5, requires_grad=True)
    cases.append(
        (
            losses.ListKDLoss(0.5, 2.0, 1.5, "decoupled")(student, logits),
            reference.list_kd(student, logits, 0.5, 2.0, 1.5, "decoupled"),
            (student, logits),
        )
    )
    cases.append((losses.EmbKDLoss(3.0)(student, logits), reference.emb_kd(student, logits, 3.0), (student, logits)))
    for ours, truth, leaves in cases:
        torch.testing.assert_close(ours, truth)
        torch.testing.assert_close(
            torch.autograd.grad(ours, leaves, retain_graph=True), torch.autograd.grad(truth, leaves, retain_graph=True)
        )


def test_bpr_replaces_a_hand_written_line():
    pos, neg = torch.randn(2, 50)
    torch.testing.assert_close(losses.BPRLoss()(pos, neg), -torch.nn.functional.logsigmoid(pos - neg).mean())


def test_modules_take_half_precision_and_print_their_settings():
    s, t = torch.randn(4, 5).bfloat16(), torch.randn(4, 5).bfloat16()
    assert losses.ListKDLoss()(s, t).dtype == torch.float32
    assert "tau=2.0" in repr(losses.ListKDLoss(tau=2.0)) and "gamma=3.0" in repr(losses.EmbKDLoss(3.0))
    assert "kind='positive'" in repr(losses.PairKDLoss(kind="positive"))


def test_the_score_and_the_embedding_form_agree():
    user_emb, item_emb, users = torch.randn(5, 8), torch.randn(9, 8), torch.tensor([1, 1, 4])
    candidates, teacher = torch.randint(0, 9, (3, 4)), torch.randn(3, 4)
    scores = ops.list_scores(user_emb, item_emb, users, candidates)
    torch.testing.assert_close(
        losses.ListKDLoss()(scores, teacher), ops.list_kd_loss(user_emb, item_emb, users, candidates, teacher)
    )
