"""Device functions of the losses; the same forms as csrc/loss_math.h, which says why each is stable."""

import triton
import triton.language as tl


@triton.jit
def log1p(e):
    """log(1 + e) for e in [0, 1], without losing small e: Triton has no log1p outside libdevice."""
    u = 1 + e
    exact = u == 1
    return tl.where(exact, e, tl.log(u) * (e / tl.where(exact, 1, u - 1)))


@triton.jit
def logistic(x):
    """sigmoid(x), sigmoid(-x) and their logarithms; finite for any finite x."""
    e = tl.exp(-tl.abs(x))
    r = 1 / (1 + e)
    shift = log1p(e)
    p = tl.where(x < 0, e * r, r)
    q = tl.where(x < 0, r, e * r)
    return p, q, tl.minimum(x, 0) - shift, tl.minimum(-x, 0) - shift


@triton.jit
def kl_bernoulli(t, s):
    """KL(Bernoulli(sigmoid t) || Bernoulli(sigmoid s)) and its gradients by s and t."""
    t_p, t_q, t_lp, t_lq = logistic(t)
    s_p, s_q, s_lp, s_lq = logistic(s)
    kl = t_p * (t_lp - s_lp) + t_q * (t_lq - s_lq)
    return kl, t_q * s_p - t_p * s_q, t_p * t_q * (t - s)


@triton.jit
def pair_kd(t, s, BERNOULLI: tl.constexpr):
    """PairKD of logits without tau^2, and its gradients by s and t; without BERNOULLI the first term of the KL alone."""
    if BERNOULLI:
        loss, by_s, by_t = kl_bernoulli(t, s)
    else:
        t_p, t_q, t_lp, _t_lq = logistic(t)
        _s_p, s_q, s_lp, _s_lq = logistic(s)
        loss = t_p * (t_lp - s_lp)
        by_s = -(t_p * s_q)
        by_t = t_p * t_q * (1 + (t_lp - s_lp))
    return loss, by_s, by_t
