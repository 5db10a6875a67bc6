# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""Closed forms: the law that each update has on a Gaussian target, at its finite step.

On an energy (w - m)' A (w - m) / 2 with gradient noise of covariance V every update is linear, z' = F z + noise of
covariance Q, and its stationary covariance solves C = F C F' + Q. F and Q are written down here from the equations, not
from the code. P is a vector (the diagonal of the preconditioner).
"""

import itertools

import numpy as np
from scipy.linalg import solve_discrete_lyapunov


def sgld(A, a, T=1.0, P=None, V=None):
    """Covariance of w."""
    A, P, V, eye = _prepare(A, P, V)
    return solve_discrete_lyapunov(eye - a * P @ A, 2 * a * T * P + a**2 * P @ V @ P)


def sghmc(A, a, b, T=1.0, P=None, V=None):
    """Covariance of (w, v): v' = b v - a A w + sqrt(2 (1 - b) a T / P) xi, w' = w + P v'."""
    A, P, V, eye = _prepare(A, P, V)
    S = 2 * (1 - b) * a * T * np.linalg.inv(P) + a**2 * V
    F = np.block([[eye - a * P @ A, b * P], [-a * A, b * eye]])
    G = np.vstack([P, eye])
    return solve_discrete_lyapunov(F, G @ S @ G.T)


def flat_euler(A, a, eta, T=1.0, P=None, V=None):
    """Covariance of (w, u) under the joint Euler step."""
    A, P, V, eye = _prepare(A, P, V)
    F = np.block([[eye - a * (P @ A + eye / eta), a / eta * eye], [a / eta * eye, (1 - a / eta) * eye]])
    return solve_discrete_lyapunov(F, _blocks(2 * a * T * P + a**2 * P @ V @ P, 2 * a * T * P))


def flat_exact(A, a, eta, T=1.0, P=None, V=None):
    """Covariance of (w, u): a gradient step of w, then d = w - u as an Ornstein-Uhlenbeck process and s = (w + u) / 2
    as a Brownian motion, over time a."""
    A, P, V, eye = _prepare(A, P, V)
    r = np.exp(-2 * a / eta)
    to_sd = np.block([[eye / 2, eye / 2], [eye, -eye]])
    flow = np.linalg.inv(to_sd) @ _blocks(eye, r * eye) @ to_sd
    back = np.linalg.inv(to_sd)
    noise = back @ _blocks(a * T * P, eta * T * (1 - r**2) * P) @ back.T
    F = flow @ _blocks(eye - a * P @ A, eye)
    return solve_discrete_lyapunov(F, flow @ _blocks(a**2 * P @ V @ P, 0 * eye) @ flow.T + noise)


def flat_gibbs(A, a, eta, m, T=1.0, P=None, V=None):
    """Covariance of (w, u) after the m steps that follow a refreshment of u."""
    A, P, V, eye = _prepare(A, P, V)
    refresh, fresh = np.block([[eye, 0 * eye], [eye, 0 * eye]]), _blocks(0 * eye, eta * T * P)
    F = np.block([[eye - a * (P @ A + eye / eta), a / eta * eye], [0 * eye, eye]])
    Q = _blocks(2 * a * T * P + a**2 * P @ V @ P, 0 * eye)
    total, noise = F @ refresh, F @ fresh @ F.T + Q
    for _ in range(m - 1):
        total, noise = F @ total, F @ noise @ F.T + Q
    return solve_discrete_lyapunov(total, noise)


def flat_momentum(A, a, eta, b, T=1.0, P=None, V=None):
    """Covariance of (w, u, v, q) under the joint step with momentum."""
    A, P, V, eye = _prepare(A, P, V)
    inverse = np.linalg.inv(P)
    H = np.block([[A + inverse / eta, -inverse / eta], [-inverse / eta, inverse / eta]])
    PP, I2 = _blocks(P, P), np.eye(2 * len(A))
    S = 2 * (1 - b) * a * T * _blocks(inverse, inverse) + a**2 * _blocks(V, 0 * eye)
    F = np.block([[I2 - a * PP @ H, b * PP], [-a * H, b * I2]])
    G = np.vstack([PP, I2])
    return solve_discrete_lyapunov(F, G @ S @ G.T)


def averaged(A, a, tau, T=1.0, P=None, V=None):
    """Covariance of (w, u): SGLD, then u' = u + (w' - u) / tau."""
    A, P, V, eye = _prepare(A, P, V)
    step, S = eye - a * P @ A, 2 * a * T * P + a**2 * P @ V @ P
    F = np.block([[step, 0 * eye], [step / tau, (1 - 1 / tau) * eye]])
    G = np.vstack([eye, eye / tau])
    return solve_discrete_lyapunov(F, G @ S @ G.T)


def spike_slab_regression(x, y, slab, spike, theta, groups):
    """Inclusion probabilities of groups and means of coefficients, by a sum over all 2^G models, at noise variance 1.

    :param groups: The group of each column of x.
    """
    count = max(groups) + 1
    indicators, log_weights, means = [], [], []
    for indicator in itertools.product([0, 1], repeat=count):
        variance = np.where(np.array(indicator)[groups], slab, spike)
        C = (x * variance) @ x.T + np.eye(len(y))
        solved = np.linalg.solve(C, y)
        included = sum(indicator)
        prior = included * np.log(theta) + (count - included) * np.log(1 - theta)
        log_weights.append(prior - (np.linalg.slogdet(C)[1] + y @ solved) / 2)
        indicators.append(indicator)
        means.append(variance * (x.T @ solved))
    weights = np.exp(np.array(log_weights) - max(log_weights))
    weights /= weights.sum()
    return weights @ np.array(indicators), weights @ np.array(means)


def _prepare(A, P, V):
    A = np.atleast_2d(np.asarray(A, float))
    eye = np.eye(len(A))
    P = eye if P is None else np.diag(np.atleast_1d(P))
    V = 0 * eye if V is None else np.atleast_2d(V)
    return A, P, V, eye


def _blocks(one, other):
    zero = np.zeros_like(one)
    return np.block([[one, zero], [zero, other]])


def covariance_z_scores(draws, mean, covariance):
    """Deviations of the sample mean and covariance of independent Gaussian draws from the exact, in standard errors."""
    n = len(draws)
    variance = np.diag(covariance)
    mean_z = (draws.mean(0) - mean) / np.sqrt(variance / n)
    standard_error = np.sqrt((np.outer(variance, variance) + covariance**2) / n)
    return mean_z, (np.cov(draws.T).reshape(covariance.shape) - covariance) / standard_error


def linear_ensemble(a, b, kl, mmd, mean, scale, particles, step):
    """An ensemble on the energy a (t - b)^2 / 2 with the prior N(mean, scale^2) and the linear kernel: the mean, the
    variance of the ensemble mean and that within the ensemble, at the finite step."""
    curvature = a + kl / scale**2
    centre = (a * b + (mmd + kl / scale**2) * mean) / (curvature + mmd)
    of_mean = 2 * kl / particles / ((curvature + mmd) * (2 - step * (curvature + mmd)))
    within = (particles - 1) / particles * 2 * kl / (curvature * (2 - step * curvature))
    return centre, of_mean, within


def rbf_mean_under_normal(t, h, scale=1.0):
    """The mean of exp(-(t - t')^2 / (2 h^2)) over t' from N(0, scale^2)."""
    return np.sqrt(h**2 / (h**2 + scale**2)) * np.exp(-(t**2) / (2 * (h**2 + scale**2)))


def wasserstein_fixed_point(grid, energy, kl, mmd, h):
    """Density on a grid that minimizes E[energy] + mmd / 2 MMD^2(Q, N(0, 1)) + kl KL(Q, N(0, 1)) with the RBF kernel:
    entropic mirror descent on log q, with a rate at which it converges for any mmd."""
    width = grid[1] - grid[0]
    kernel = np.exp(-((grid[:, None] - grid) ** 2) / (2 * h**2))
    fixed = -(energy - mmd * rbf_mean_under_normal(grid, h)) / kl - grid**2 / 2
    rate, log_q = kl / (kl + mmd), fixed.copy()
    for _ in range(5000):
        q = np.exp(log_q - log_q.max())
        q /= q.sum() * width
        new = (1 - rate) * np.log(q) + rate * (fixed - mmd / kl * kernel @ q * width)
        if np.abs(new - new.max() - (log_q - log_q.max())).max() < 1e-12:
            break
        log_q = new
    return q


def two_particles(grid, energy, kl, mmd, h):
    """The joint law of two particles, exp(-U / kl), on a grid, for the prior N(0, 1) and the RBF kernel; mean, variance
    and correlation."""
    alone = (energy - mmd * rbf_mean_under_normal(grid, h)) / kl + grid**2 / 2
    kernel = np.exp(-((grid[:, None] - grid) ** 2) / (2 * h**2))
    log_p = -(alone[:, None] + alone + mmd / (2 * kl) * kernel)  # mmd / (2 N) over both ordered pairs
    p = np.exp(log_p - log_p.max())
    p /= p.sum()
    marginal = p.sum(1)
    mean = marginal @ grid
    variance = marginal @ (grid - mean) ** 2
    return p, (mean, variance, (grid - mean) @ p @ (grid - mean) / variance)
