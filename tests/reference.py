"""The algorithms in NumPy and float64, with backward passes of their own: what tests hold agents/ against.

Written from the equations, one mini-batch and one critic after the other. A layer is a function that returns its
output and its way back: from the loss's derivative of the output to that of the input, and the gradients. Weights
and running statistics of a net lie side by side under their onboard names, "dense0/kernel", "norm0/mean", ...
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest

OBS, ACT = 5, 2
LAYER_EPSILON, BATCH_EPSILON, KEPT = 1e-6, 1e-5, 0.99


def batches_of(cfg, utd, seed=0):
    """(utd, batch, ...) mini-batches of random numbers, every third transition a true end."""
    rng = np.random.default_rng(seed)
    draw = lambda *s: rng.uniform(-1, 1, (utd, cfg.batch, *s)).astype(np.float32)  # noqa: E731
    discount = np.where(rng.random((utd, cfg.batch)) < 0.3, 0, cfg.gamma).astype(np.float32)
    return {
        "obs": 2 * draw(OBS), "action": draw(ACT), "prev_action": draw(ACT), "reward": 3 * draw(),
        "discount": discount, "next_obs": 2 * draw(OBS), "next_prev_action": draw(ACT),
        "return_max": np.full((utd, cfg.batch), 6.8, np.float32),
    }  # fmt: skip


def moved(state, seed=3):
    """The state with weights and statistics off their initial values: no gradient is zero by construction."""
    import jax

    rng = np.random.default_rng(seed)
    shake = lambda x: np.asarray(x) + rng.normal(0, 0.1, x.shape).astype(np.float32)  # noqa: E731
    names = {"actor", "average", "critic", "target"} & set(state._fields)
    return state._replace(**{name: jax.tree.map(shake, getattr(state, name)) for name in sorted(names)})


def flat(variables):
    """{"dense0/kernel": float64, ...} of flax variables: {"params": ...} and perhaps {"stats": ...}."""
    out = {}
    for tree in variables.values():
        for k, v in tree.items():
            of_block = {f"{k}/{name}": x for name, x in v.items()} if isinstance(v, dict) else None
            out |= of_block or {"/".join(k.rsplit("_", 1)): v}  # the critics' dense layers: "dense0_kernel"
    return {name: np.asarray(x, np.float64) for name, x in out.items()}


def members_of(weights):
    """What `flat` makes of an ensemble, one dictionary a member."""
    count = len(next(iter(weights.values())))
    return [{k: v[i] for k, v in weights.items()} for i in range(count)]


def stacked(rows):
    return {k: np.stack([row[k] for row in rows]) for k in rows[0]}


# ------------------------------------------------------------------ layers


def dense(p, name, x):
    """Without a bias where p has none."""
    kernel, bias = p[f"{name}/kernel"], p.get(f"{name}/bias")

    def back(dy):
        of_bias = {} if bias is None else {f"{name}/bias": dy.sum(0)}
        return dy @ kernel.T, {f"{name}/kernel": x.T @ dy} | of_bias

    return x @ kernel + (0 if bias is None else bias), back


def relu(x):
    return np.maximum(x, 0), lambda dy: (dy * (x > 0), {})


def times(x, mask):
    return x * mask, lambda dy: (dy * mask, {})


def norm(p, name, x, axis, epsilon, running=False):
    """Over `axis`: layer norm -1, batch norm 0; with `running` by the statistics that p holds. As p, without a bias."""
    scale, bias = p[f"{name}/scale"], p.get(f"{name}/bias")
    if running:
        mean, var = p[f"{name}/mean"], p[f"{name}/var"]
    else:
        mean = x.mean(axis, keepdims=True)
        var = ((x - mean) ** 2).mean(axis, keepdims=True)
    inverse = 1 / np.sqrt(var + epsilon)
    n = (x - mean) * inverse

    def back(dy):
        dn = dy * scale
        grads = {f"{name}/scale": (dy * n).sum(0).reshape(scale.shape)}
        if bias is not None:
            grads[f"{name}/bias"] = dy.sum(0).reshape(bias.shape)
        if running:
            return dn * inverse, grads
        along = n * (dn * n).mean(axis, keepdims=True)
        return inverse * (dn - dn.mean(axis, keepdims=True) - along), grads

    return n * scale + (0 if bias is None else bias), back, (mean, var)


def chain(ways_back):
    """The way back through layers, given in the order in which they were passed."""

    def back(dy):
        grads = {}
        for layer in reversed(ways_back):
            dy, more = layer(dy)
            grads |= more
        return dy, grads

    return back


def body(p, x, layers, kind, running=False, masks=None):
    """The hidden layers: dense (mask) (norm) relu. Output, way back, p with the new running statistics."""
    back, new = [], dict(p)

    def normed(name, x):
        axis, epsilon = (-1, LAYER_EPSILON) if kind == "layer" else (0, BATCH_EPSILON)
        x, way, (mean, var) = norm(p, name, x, axis, epsilon, running)
        back.append(way)
        if kind == "batch" and not running:
            for leaf, value in (("mean", mean), ("var", var)):
                old = p[f"{name}/{leaf}"]
                new[f"{name}/{leaf}"] = KEPT * old + (1 - KEPT) * value.reshape(old.shape)
        return x

    if kind == "batch":
        x = normed("input", x)
    for i in range(layers):
        x, way = dense(p, f"dense{i}", x)
        back.append(way)
        if masks is not None:
            x, way = times(x, masks[i])
            back.append(way)
        if kind != "none":
            x = normed(f"norm{i}", x)
        x, way = relu(x)
        back.append(way)
    return x, chain(back), new


def critic(cfg, p, kind, obs, action, running=False, masks=None):
    """(batch, outputs) of one critic, its way back (to the action) and p with new statistics."""
    h, back, new = body(p, np.concatenate([obs, action], -1), len(cfg.hidden), kind, running, masks)
    out, head = dense(p, "value", h)

    def whole(dout):
        dx, grads = chain([back, head])(dout)
        return dx[:, obs.shape[-1] :], grads

    return out, whole, new


def policy(cfg, p, kind, obs, prev, noise, running=True):
    """Action and log-density of a squashed Gaussian within its window, the way back from both, new statistics."""
    h, back, new = body(p, obs, len(cfg.actor_hidden or cfg.hidden), kind, running)
    mean, mean_back = dense(p, "mean", h)
    raw, std_back = dense(p, "log_std", h)
    log_std = np.clip(raw, -20, 2)
    t = np.tanh(mean + np.exp(log_std) * noise)
    log_prob = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi) - np.log(1 - t**2)
    low, half = window(cfg, prev)

    def whole(daction, dlogp):
        du = dlogp[:, None] * 2 * t + daction * half * (1 - t**2)  # d(-log(1 - tanh(u)^2))/du = 2 tanh(u)
        draw = (du * np.exp(log_std) * noise - dlogp[:, None]) * ((raw > -20) & (raw < 2))
        (dh, grads), (more, others) = mean_back(du), std_back(draw)
        return grads | others | back(dh + more)[1]

    return low + (t + 1) * half, (log_prob - np.log(half)).sum(-1), whole, new


def window(cfg, prev):
    """Lower end and half the width of what is allowed after `prev`."""
    if cfg.max_delta is None:
        return -np.ones_like(prev), np.ones_like(prev)
    low, high = np.maximum(prev - cfg.max_delta, -1), np.minimum(prev + cfg.max_delta, 1)
    return low, (high - low) / 2


class Adam:
    """Kingma & Ba 2015; `mu` is their first moment."""

    def __init__(self, lr, b1=0.9):
        self.lr, self.b1, self.mu, self.nu, self.t = lr, b1, {}, {}, 0

    def step(self, p, grads):
        self.t += 1
        out = dict(p)
        for k, g in grads.items():
            self.mu[k] = self.b1 * self.mu.get(k, 0) + (1 - self.b1) * g
            self.nu[k] = 0.999 * self.nu.get(k, 0) + 0.001 * g**2
            mean, square = self.mu[k] / (1 - self.b1**self.t), self.nu[k] / (1 - 0.999**self.t)
            out[k] = p[k] - self.lr * mean / (np.sqrt(square) + 1e-8)
        return out


def unit(p):
    """The columns of hidden kernels at length 1."""
    return p | {
        k: v / np.sqrt((v**2).sum(0)) for k, v in p.items() if k.startswith("dense") and k.endswith("kernel")
    }


# ------------------------------------------------------------------ the same random numbers as the update draws


def dropout_mask(words, shape, rate):
    """Wellons' lowbias32 of the element's number, keyed by two words."""
    words = [int(w) for w in words]
    x = np.arange(math.prod(shape), dtype=np.uint64)
    low = np.uint64(0xFFFFFFFF)
    x = (x * np.uint64(0x9E3779B9) + np.uint64(words[0])) & low
    x = ((x ^ (x >> np.uint64(16))) * np.uint64(0x7FEB352D)) & low
    x = x ^ np.uint64(words[1])
    x = ((x ^ (x >> np.uint64(15))) * np.uint64(0x846CA68B)) & low
    x = x ^ (x >> np.uint64(16))
    return np.where(x >= int(rate * 2**32), 1 / (1 - rate), 0.0).reshape(shape)


def masks_of(cfg, key, members):
    """For each layer (members, batch, width), or None where nothing is dropped."""
    import jax

    if not getattr(cfg, "dropout", 0):
        return [None] * members
    words = [jax.random.key_data(jax.random.fold_in(key, i)) for i in range(len(cfg.hidden))]
    shapes = [(members, cfg.batch, width) for width in cfg.hidden]
    layers = [dropout_mask(w, s, cfg.dropout) for w, s in zip(words, shapes, strict=True)]
    return [[layer[i] for layer in layers] for i in range(members)]


def draws(cfg, key):
    """What the updates of one call take from the state's key (all of them, then one of the actor)."""
    import jax

    noise_of = lambda key, *shape: np.asarray(jax.random.normal(key, (*shape, cfg.batch, ACT)), np.float64)  # noqa: E731
    key, next_key, fit_key = jax.random.split(key, 3)
    fits = []
    for one in jax.random.split(fit_key, cfg.utd):
        subset_key, target_key, online_key = jax.random.split(one, 3)
        subset = getattr(cfg, "subset", cfg.ensemble)
        order = np.argsort(-np.asarray(jax.random.uniform(subset_key, (cfg.ensemble,))))
        fits.append(
            SimpleNamespace(
                members=order[:subset] if subset < cfg.ensemble else np.arange(subset),
                target_masks=masks_of(cfg, target_key, subset), masks=masks_of(cfg, online_key, cfg.ensemble),
            )
        )  # fmt: skip
    _, actor_key, value_key = jax.random.split(key, 3)
    return SimpleNamespace(
        next_noise=noise_of(next_key, cfg.utd), fits=fits, noise=noise_of(actor_key),
        masks=masks_of(cfg, value_key, cfg.ensemble),
    )  # fmt: skip


# ------------------------------------------------------------------ the critics of each algorithm
# fit: loss, mean value, gradients and new statistics of each critic; value: what the actor climbs, and the way back


class Rlpd:
    """Also DroQ: the masks make the difference."""

    actor_kind, unit_kernels, has_target = "none", False, True

    @staticmethod
    def kind(cfg):
        return "layer" if cfg.layer_norm else "none"

    def fit(self, cfg, critics, targets, b, next_action, bonus, drawn):
        following = [
            critic(cfg, targets[j], self.kind(cfg), b["next_obs"], next_action, masks=masks)[0][:, 0]
            for j, masks in zip(drawn.members, drawn.target_masks, strict=True)
        ]
        y = b["reward"] + b["discount"] * (np.min(following, 0) + bonus)
        losses, values, grads = [], [], []
        for p, masks in zip(critics, drawn.masks, strict=True):
            q, back, _ = critic(cfg, p, self.kind(cfg), b["obs"], b["action"], masks=masks)
            error = q - y[:, None]
            losses.append((error**2).mean())
            values.append(q.mean())
            grads.append(back(2 * error / (len(critics) * len(y)))[1])
        return np.mean(losses), np.mean(values), grads, critics

    def value(self, cfg, critics, obs, action, masks):
        passes = [
            critic(cfg, p, self.kind(cfg), obs, action, masks=m)[:2] for p, m in zip(critics, masks, strict=True)
        ]
        back = lambda dv: sum(way(dv[:, None] / len(critics))[0] for _, way in passes)  # noqa: E731
        return np.mean([q[:, 0] for q, _ in passes], 0), back


class CrossQ:
    actor_kind, unit_kernels, has_target = "batch", False, False

    def fit(self, cfg, critics, targets, b, next_action, bonus, drawn):
        rows = len(bonus)
        obs, action = np.concatenate([b["obs"], b["next_obs"]]), np.concatenate([b["action"], next_action])
        passes = [critic(cfg, p, "batch", obs, action) for p in critics]
        y = b["reward"] + b["discount"] * (np.min([q[rows:, 0] for q, _, _ in passes], 0) + bonus)
        losses, values, grads = [], [], []
        for q, back, _ in passes:
            error = q[:rows] - y[:, None]
            losses.append((error**2).mean())
            values.append(q[:rows].mean())
            # nothing comes from the rows of s', but their share in the statistics carries gradient
            dq = np.concatenate([2 * error / (len(critics) * rows), np.zeros((rows, 1))])
            grads.append(back(dq)[1])
        return np.mean(losses), np.mean(values), grads, [new for _, _, new in passes]

    def value(self, cfg, critics, obs, action, masks):
        passes = [critic(cfg, p, "batch", obs, action, running=True)[:2] for p in critics]
        values = np.stack([q[:, 0] for q, _ in passes])
        least = values.argmin(0)
        back = lambda dv: sum(way((dv * (least == i))[:, None])[0] for i, (_, way) in enumerate(passes))  # noqa: E731
        return values.min(0), back


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def project(cfg, probabilities, places):
    """C51's projection (Bellemare et al. 2017, algorithm 1), atom by atom."""
    out, spacing = np.zeros(probabilities.shape), 2 * cfg.reach / (cfg.atoms - 1)
    for row in range(len(places)):
        for mass, place in zip(probabilities[row], places[row], strict=True):
            at = (min(max(place, -cfg.reach), cfg.reach) + cfg.reach) / spacing
            below, above = math.floor(at), math.ceil(at)
            if above > below:
                out[row, below] += mass * (above - at)
                out[row, min(above, cfg.atoms - 1)] += mass * (at - below)
            else:
                out[row, below] += mass
    return out


class Xqc:
    actor_kind, unit_kernels, has_target = "batch", True, True

    def fit(self, cfg, critics, targets, b, next_action, bonus, drawn):
        rows, support = len(bonus), np.linspace(-cfg.reach, cfg.reach, cfg.atoms)
        obs, action = np.concatenate([b["obs"], b["next_obs"]]), np.concatenate([b["action"], next_action])
        following = np.stack([softmax(critic(cfg, p, "batch", obs, action)[0][rows:]) for p in targets])
        least = (following @ support).argmin(0)
        chosen = following[least, np.arange(rows)]
        scale = b["return_max"] / (0.8 * cfg.reach)
        places = (b["reward"] / scale)[:, None] + b["discount"][:, None] * (support + bonus[:, None])
        goal = project(cfg, chosen, places)
        losses, values, grads, made = [], [], [], []
        for p in critics:
            logits, back, new = critic(cfg, p, "batch", obs, action)
            share = softmax(logits[:rows])
            given = np.where(goal > 0, goal, 1.0)  # 0 log 0 = 0
            losses.append((goal * (np.log(given) - np.log(share))).sum(-1).mean())
            values.append((share @ support).mean())
            dlogits = np.concatenate([(share - goal) / (len(critics) * rows), np.zeros_like(share)])
            grads.append(back(dlogits)[1])
            made.append(new)
        return np.mean(losses), np.mean(values) * scale.mean(), grads, made

    def value(self, cfg, critics, obs, action, masks):
        support = np.linspace(-cfg.reach, cfg.reach, cfg.atoms)
        passes = [critic(cfg, p, "batch", obs, action, running=True)[:2] for p in critics]
        shares = [softmax(logits) for logits, _ in passes]
        values = np.stack([share @ support for share in shares])
        least = values.argmin(0)

        def back(dv):
            total = 0
            for i, (_, way) in enumerate(passes):
                dlogits = shares[i] * (support - values[i][:, None]) * (dv * (least == i))[:, None]
                total = total + way(dlogits)[0]
            return total

        return values.min(0), back


# ------------------------------------------------------------------ one call of an update


def update(algorithm, cfg, state, batches, drawn):
    """`cfg.utd` updates of the critics: losses, first moments, critic and target."""
    actor, temperature = flat(state.actor), math.exp(float(state.log_temperature))
    critics, targets = members_of(flat(state.critic)), members_of(flat(state.target)) if state.target else []
    adams, losses, values = [Adam(cfg.critic_lr, cfg.adam_b1) for _ in critics], [], []
    batches = {k: v.astype(np.float64) for k, v in batches.items()}
    for u, fit in enumerate(drawn.fits):
        b = {k: v[u] for k, v in batches.items()}
        next_action, log_prob, _, _ = policy(
            cfg, actor, algorithm.actor_kind, b["next_obs"], b["next_prev_action"], drawn.next_noise[u]
        )
        bonus = -cfg.backup_entropy * temperature * log_prob
        next_action = seen(cfg, next_action, b["next_prev_action"])
        b["action"] = seen(cfg, b["action"], b["prev_action"])
        loss, value, grads, critics = algorithm.fit(cfg, critics, targets, b, next_action, bonus, fit)
        critics = [adam.step(p, g) for adam, p, g in zip(adams, critics, grads, strict=True)]
        if algorithm.unit_kernels:
            critics = [unit(p) for p in critics]
        for i, old in enumerate(targets):
            targets[i] = {k: (1 - cfg.tau) * v + cfg.tau * critics[i][k] for k, v in old.items()}
        losses.append(loss)
        values.append(value)
    return SimpleNamespace(
        critic=stacked(critics), target=stacked(targets) if targets else {}, mu=stacked([a.mu for a in adams]),
        metrics={"critic_loss": np.mean(losses), "q_mean": np.mean(values)},
    )  # fmt: skip


def seen(cfg, action, prev):
    """What the critics see of an action."""
    return (action - prev) / cfg.max_delta if cfg.relative else action


def actor_update(algorithm, cfg, state, critic_then, batches, drawn):
    """The update of actor and temperature after that of the critics: loss, first moments, actor."""
    p, log_t = flat(state.actor), float(state.log_temperature)
    temperature, n = math.exp(log_t), cfg.batch
    b = {k: v[-1].astype(np.float64) for k, v in batches.items()}
    action, log_prob, back, p = policy(
        cfg, p, algorithm.actor_kind, b["obs"], b["prev_action"], drawn.noise, running=False
    )
    looked = seen(cfg, action, b["prev_action"])
    value, value_back = algorithm.value(cfg, members_of(critic_then), b["obs"], looked, drawn.masks)
    climb = value_back(np.full(n, -1 / n)) / (cfg.max_delta if cfg.relative else 1.0)
    grads = back(climb, np.full(n, temperature / n))
    adam, temp_adam, entropy = Adam(cfg.actor_lr, cfg.adam_b1), Adam(cfg.temp_lr, cfg.adam_b1), -log_prob.mean()
    actor = adam.step(p, grads)
    log_t = temp_adam.step({"t": log_t}, {"t": temperature * (entropy - cfg.entropy_goal(ACT))})["t"]
    return SimpleNamespace(
        actor=unit(actor) if algorithm.unit_kernels else actor, mu=adam.mu, temp_mu=temp_adam.mu["t"], log_t=log_t,
        metrics={
            "entropy": entropy, "temperature": temperature,
            "actor_loss": (temperature * log_prob - value).mean(),
        },
    )  # fmt: skip


def relative(got, want):
    return np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)


def check_update(algorithm, agent, cfg, seed=0):
    """Hold one call of `agent.update` against the above: losses and gradients to 1e-5, then all that they change."""
    import jax

    state = moved(agent.init(cfg, jax.random.key(seed), OBS, ACT))
    batches = batches_of(cfg, cfg.utd, seed)
    drawn = draws(cfg, state.key)
    want = update(algorithm, cfg, state, batches, drawn)
    before = jax.tree.map(np.array, state._replace(key=None))
    new, metrics = agent.update(cfg, state, batches)
    after = actor_update(algorithm, cfg, before, flat(new.critic), batches, drawn)

    expected = want.metrics | after.metrics
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert float(metrics[name]) == pytest.approx(value, rel=1e-5), name
    for part, got, reference in (("critic", new.critic_opt, want.mu), ("actor", new.actor_opt, after.mu)):
        got = flat({"params": got[0].mu})
        assert got.keys() == reference.keys()
        for name, value in got.items():
            assert relative(value, reference[name]) <= 1e-5, (part, name)
    assert float(new.temp_opt[0].mu) == pytest.approx(after.temp_mu, rel=1e-5)
    assert float(new.log_temperature) == pytest.approx(after.log_t, rel=1e-5)
    same(new.critic, want.critic)
    same(new.target, want.target)
    same(new.actor, after.actor)
    same(new.average, after.actor)  # the first of its kind
    assert int(new.updates) == cfg.utd
    return new, metrics


def same(variables, want):
    """Weights and statistics equal."""
    got = flat(variables)
    assert got.keys() == want.keys()
    for name, value in got.items():
        np.testing.assert_allclose(value, want[name], rtol=1e-5, atol=2e-6, err_msg=name)
