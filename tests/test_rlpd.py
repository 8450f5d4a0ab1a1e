"""RLPD against a NumPy version written from the equations, with its own backward pass, in float64."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

jax = pytest.importorskip("jax")

from tether.agents import rlpd  # noqa: E402
from tether.agents.replay import Replay, minibatches, symmetric  # noqa: E402

OBS, ACT = 5, 2
CASES = {  # between them every switch is on and off
    "window": (
        rlpd.Config(ensemble=3, hidden=(16, 12), batch=8, utd=1, max_delta=0.3, init_temperature=0.7),
        1,
    ),
    "plain": (
        rlpd.Config(
            ensemble=2, subset=2, hidden=(16, 12), batch=8, utd=3, backup_entropy=False, layer_norm=False,
            target_entropy=-1.5, gamma=0.9, tau=0.1,
        ),
        3,
    ),
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def quick_compiles():
    """Half the time of these tests would go into optimising nets that are too small to gain from it."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def batches_of(cfg, utd, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *s: rng.uniform(-1, 1, (utd, cfg.batch, *s)).astype(np.float32)  # noqa: E731
    discount = np.where(rng.random((utd, cfg.batch)) < 0.3, 0, cfg.gamma).astype(np.float32)
    return {
        "obs": 2 * draw(OBS), "action": draw(ACT), "prev_action": draw(ACT), "reward": 3 * draw(),
        "discount": discount, "next_obs": 2 * draw(OBS), "next_prev_action": draw(ACT),
    }  # fmt: skip


def moved(state, seed=3):
    """The state with weights off their initial values, so that no gradient is zero by construction."""
    rng = np.random.default_rng(seed)
    shake = lambda x: x + rng.normal(0, 0.1, x.shape).astype(np.float32)  # noqa: E731
    return state._replace(
        **{n: jax.tree.map(shake, getattr(state, n)) for n in ("actor", "critic", "target")}
    )


# ------------------------------------------------------------------ the NumPy version


def norm_forward(x):
    centred = x - x.mean(-1, keepdims=True)
    inverse = 1 / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    return centred * inverse, inverse


def norm_backward(dn, n, inverse):
    return inverse * (dn - dn.mean(-1, keepdims=True) - n * (dn * n).mean(-1, keepdims=True))


def mlp_forward(p, x, layers, norm):
    """Dense -> (LayerNorm) -> ReLU; p has "dense0/kernel", ... Returns output and what backward needs."""
    tape = []
    for i in range(layers):
        z, n, inverse = x @ p[f"dense{i}/kernel"] + p[f"dense{i}/bias"], None, None
        if norm:
            n, inverse = norm_forward(z)
            z = n * p[f"norm{i}/scale"] + p[f"norm{i}/bias"]
        tape.append((x, n, inverse, z > 0))
        x = np.maximum(z, 0)
    return x, tape


def mlp_backward(p, tape, dx):
    grads = {}
    for i in reversed(range(len(tape))):
        x, n, inverse, on = tape[i]
        dz = dx * on
        if n is not None:
            grads[f"norm{i}/scale"], grads[f"norm{i}/bias"] = (dz * n).sum(0), dz.sum(0)
            dz = norm_backward(dz * p[f"norm{i}/scale"], n, inverse)
        grads[f"dense{i}/kernel"], grads[f"dense{i}/bias"] = x.T @ dz, dz.sum(0)
        dx = dz @ p[f"dense{i}/kernel"].T
    return grads, dx


def critic_forward(cfg, p, obs, action):
    h, tape = mlp_forward(p, np.concatenate([obs, action], -1), len(cfg.hidden), cfg.layer_norm)
    return (h @ p["value/kernel"] + p["value/bias"])[:, 0], (h, tape)


def critic_backward(p, saved, dq):
    h, tape = saved
    grads, dx = mlp_backward(p, tape, dq[:, None] @ p["value/kernel"].T)
    return grads | {"value/kernel": h.T @ dq[:, None], "value/bias": dq.sum(keepdims=True)}, dx


def policy_forward(cfg, p, obs, prev, noise):
    h, tape = mlp_forward(p, obs, len(cfg.hidden), False)
    mean, raw = (h @ p[f"{head}/kernel"] + p[f"{head}/bias"] for head in ("mean", "log_std"))
    log_std = np.clip(raw, -20, 2)
    u = mean + np.exp(log_std) * noise
    t = np.tanh(u)
    log_prob = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi) - np.log(1 - t**2)
    half = np.ones_like(prev)  # half the width of the window
    low = -half
    if cfg.max_delta is not None:
        low, high = np.maximum(prev - cfg.max_delta, -1), np.minimum(prev + cfg.max_delta, 1)
        half = (high - low) / 2
    action = low + (t + 1) * half
    return action, (log_prob - np.log(half)).sum(-1), (h, tape, raw, log_std, t, half)


def policy_backward(p, saved, noise, dlogp, da):
    """Gradients of a loss with derivatives dlogp (batch,) and da (batch, action)."""
    h, tape, raw, log_std, t, half = saved
    du = dlogp[:, None] * 2 * t + da * half * (1 - t**2)  # d(-log(1 - tanh(u)^2))/du = 2 tanh(u)
    draw = (du * np.exp(log_std) * noise - dlogp[:, None]) * ((raw > -20) & (raw < 2))
    heads = {"mean": du, "log_std": draw}
    dh = sum(d @ p[f"{k}/kernel"].T for k, d in heads.items())
    grads, _ = mlp_backward(p, tape, dh)
    for k, d in heads.items():
        grads |= {f"{k}/kernel": h.T @ d, f"{k}/bias": d.sum(0)}
    return grads


class Adam:
    """Kingma & Ba 2015; `mu` is their first moment."""

    def __init__(self, lr):
        self.lr, self.mu, self.nu, self.t = lr, {}, {}, 0

    def step(self, p, grads):
        self.t += 1
        out = {}
        for k, g in grads.items():
            self.mu[k] = 0.9 * self.mu.get(k, 0) + 0.1 * g
            self.nu[k] = 0.999 * self.nu.get(k, 0) + 0.001 * g**2
            mean, square = self.mu[k] / (1 - 0.9**self.t), self.nu[k] / (1 - 0.999**self.t)
            out[k] = p[k] - self.lr * mean / (np.sqrt(square) + 1e-8)
        return out


def flat(tree):
    """{"dense0/kernel": float64} of the actor's {"dense0": {"kernel"}} and the critics' {"dense0_kernel"}."""
    out = {}
    for k, v in tree.items():
        items = (
            {f"{k}/{name}": x for name, x in v.items()}
            if isinstance(v, dict)
            else {"/".join(k.rsplit("_", 1)): v}
        )
        out |= {name: np.asarray(x, np.float64) for name, x in items.items()}
    return out


def member(params, i):
    return {k: v[i] for k, v in params.items()}


def numpy_update(cfg, state, batches, noise, last_noise, members):
    """What `rlpd.update` should do, one mini-batch and one critic after the other."""
    E = cfg.ensemble
    actor, critic, target = flat(state.actor), flat(state.critic), flat(state.target)
    critics, targets = [member(critic, i) for i in range(E)], [member(target, i) for i in range(E)]
    log_t = float(state.log_temperature)
    temperature = math.exp(log_t)
    adams, losses, values = [Adam(cfg.critic_lr) for _ in range(E)], [], []
    batches = {k: v.astype(np.float64) for k, v in batches.items()}
    for u in range(len(noise)):
        b = {k: v[u] for k, v in batches.items()}
        next_action, next_log_prob, _ = policy_forward(
            cfg, actor, b["next_obs"], b["next_prev_action"], noise[u]
        )
        y = np.min([critic_forward(cfg, targets[j], b["next_obs"], next_action)[0] for j in members[u]], 0)
        y = b["reward"] + b["discount"] * (y - cfg.backup_entropy * temperature * next_log_prob)
        errors = []
        for i in range(E):
            q, saved = critic_forward(cfg, critics[i], b["obs"], b["action"])
            grads, _ = critic_backward(critics[i], saved, 2 * (q - y) / (E * len(q)))
            critics[i] = adams[i].step(critics[i], grads)
            targets[i] = {k: (1 - cfg.tau) * v + cfg.tau * critics[i][k] for k, v in targets[i].items()}
            errors.append(((q - y) ** 2).mean())
            values.append(q.mean())
        losses.append(np.mean(errors))
    n = len(b["obs"])
    action, log_prob, saved_policy = policy_forward(cfg, actor, b["obs"], b["prev_action"], last_noise)
    qs = [critic_forward(cfg, c, b["obs"], action) for c in critics]
    da = sum(
        critic_backward(c, s, np.full(n, -1 / (E * n)))[1][:, OBS:]
        for c, (_, s) in zip(critics, qs, strict=True)
    )
    actor_adam, temp_adam, entropy = Adam(cfg.actor_lr), Adam(cfg.temp_lr), -log_prob.mean()
    grads = policy_backward(actor, saved_policy, last_noise, np.full(n, temperature / n), da)
    goal = cfg.entropy_goal(ACT)
    log_t = temp_adam.step({"t": log_t}, {"t": temperature * (entropy - goal)})["t"]
    stack = lambda rows: {k: np.stack([r[k] for r in rows]) for k in rows[0]}  # noqa: E731
    return SimpleNamespace(
        actor=actor_adam.step(actor, grads), actor_mu=actor_adam.mu, temp_mu=temp_adam.mu["t"], log_t=log_t,
        critic=stack(critics), target=stack(targets), critic_mu=stack([a.mu for a in adams]),
        metrics={
            "critic_loss": np.mean(losses), "q_mean": np.mean(values), "entropy": entropy,
            "temperature": temperature,
            "actor_loss": (temperature * log_prob - np.mean([q for q, _ in qs], 0)).mean(),
        },
    )  # fmt: skip


def relative(got, want):
    return np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_of_an_update_equal_numpy(case):
    cfg, utd = CASES[case]
    state = moved(rlpd.init(cfg, jax.random.key(0), OBS, ACT))
    batches = batches_of(cfg, utd)
    # the same random numbers, drawn as `update` draws them
    _, next_key, subset_key, actor_key = jax.random.split(state.key, 4)
    noise = np.asarray(jax.random.normal(next_key, (utd, cfg.batch, ACT)), np.float64)
    last_noise = np.asarray(jax.random.normal(actor_key, (cfg.batch, ACT)), np.float64)
    members = rlpd._subsets(cfg, subset_key, utd)
    members = [range(cfg.ensemble)] * utd if members is None else np.asarray(members)
    want = numpy_update(cfg, state, batches, noise, last_noise, members)

    new, metrics = rlpd.update(cfg, state, batches)
    assert metrics.keys() == want.metrics.keys()
    for name, value in want.metrics.items():
        assert float(metrics[name]) == pytest.approx(value, rel=1e-5), name
    # Adam's first moment after its first step is a tenth of the gradient
    moments = [(new.critic_opt[0].mu, want.critic_mu), (new.actor_opt[0].mu, want.actor_mu)]
    for got, reference in moments:
        got = flat(got)
        assert got.keys() == reference.keys()
        for name in got:
            assert relative(got[name], reference[name]) <= 1e-5, name
    assert float(new.temp_opt[0].mu) == pytest.approx(want.temp_mu, rel=1e-5)
    assert float(new.log_temperature) == pytest.approx(want.log_t, rel=1e-5)
    for name in ("actor", "critic", "target"):
        for leaf, value in flat(getattr(new, name)).items():
            np.testing.assert_allclose(value, getattr(want, name)[leaf], rtol=1e-5, atol=2e-6, err_msg=leaf)


# ------------------------------------------------------------------ what the equations leave open


def test_a_true_terminal_cuts_the_bootstrap_and_a_truncation_does_not():
    cfg, utd = CASES["window"]
    batches = batches_of(cfg, utd)
    other = batches | {"next_obs": -batches["next_obs"], "next_prev_action": -batches["next_prev_action"]}

    def loss(batches, discount):
        state = rlpd.init(cfg, jax.random.key(0), OBS, ACT)
        batches = batches | {"discount": np.full_like(batches["discount"], discount)}
        return float(rlpd.update(cfg, state, batches)[1]["critic_loss"])

    assert loss(batches, 0.0) == loss(other, 0.0)
    assert loss(batches, 0.99) != loss(other, 0.99)


def test_members_share_nothing_and_start_apart():
    cfg, _ = CASES["window"]
    critic = rlpd.init(cfg, jax.random.key(0), OBS, ACT).critic
    obs, action = np.ones((4, OBS), np.float32), np.zeros((4, ACT), np.float32)
    value = jax.jit(lambda params: rlpd._q(cfg, params, obs, action))
    before = np.asarray(value(critic))
    assert len(np.unique(before[:, 0])) == cfg.ensemble
    for name in critic:
        if name.endswith("kernel"):
            changed = np.array(critic[name])
            changed[1] += 0.5
            after = np.asarray(value(critic | {name: changed}))
            np.testing.assert_array_equal(after[[0, 2]], before[[0, 2]])
            assert (after[1] != before[1]).all(), name
    limit = math.sqrt(6 / (OBS + ACT + 16))  # Glorot uniform, of each member's own fan
    assert limit * 0.95 < np.abs(critic["dense0_kernel"]).max() <= limit


def test_subsets_are_drawn_without_replacement_and_all_alike():
    cfg = rlpd.Config(ensemble=5, subset=2)
    drawn = np.asarray(rlpd._subsets(cfg, jax.random.key(0), 4000))
    assert drawn.shape == (4000, 2) and (drawn[:, 0] != drawn[:, 1]).all()
    share = np.bincount(drawn.ravel(), minlength=5) / 4000
    np.testing.assert_allclose(share, 0.4, atol=0.03)


@pytest.mark.parametrize("case", CASES)
def test_actions_stay_in_the_box_and_its_window(case):
    cfg, _ = CASES[case]
    params = jax.tree.map(lambda x: 4 * x, rlpd.init(cfg, jax.random.key(0), OBS, ACT).actor)
    rng = np.random.default_rng(0)
    obs = 10 * rng.standard_normal((200, OBS)).astype(np.float32)
    prev = rng.choice([-1.4, -1, -0.9, 0, 0.3, 1, 1.4], (200, ACT)).astype(np.float32)
    mean = np.asarray(rlpd.act(cfg, params, obs, prev))
    sampled = np.asarray(rlpd.act(cfg, params, obs, prev, jax.random.key(1)))
    assert mean.shape == (200, ACT) and mean.dtype == np.float32 and (mean != sampled).any()
    np.testing.assert_allclose(rlpd.act(cfg, params, obs[0], prev[0]), mean[0], rtol=1e-5, atol=1e-6)
    for action in (mean, sampled):
        assert (np.abs(action) <= 1).all()
        if cfg.max_delta is not None:
            assert (np.abs(action - prev.clip(-1, 1)) <= cfg.max_delta + 1e-6).all()
            assert (np.abs(action - prev.clip(-1, 1)) > cfg.max_delta - 0.01).any()


def test_the_entropy_goal_is_within_reach_of_the_window():
    assert rlpd.Config().entropy_goal(4) == -2.0
    assert rlpd.Config(target_entropy=-3.0, max_delta=0.2).entropy_goal(2) == -3.0
    for delta in (0.05, 0.2, 1.0):
        uniform = 2 * math.log(2 * delta)  # the largest entropy the window allows
        goal = rlpd.Config(max_delta=delta).entropy_goal(2)
        assert uniform - goal == pytest.approx(2 * math.log(2) + 1)  # as without a window


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"subset": 11}, "subset = 11: must lie in 1 ... ensemble = 10"),
        ({"gamma": 1.5}, "gamma = 1.5: must lie between 0 and 1"),
        ({"hidden": (64, 0)}, "hidden = .* must be the widths"),
        ({"batch": 15}, "batch = 15: must be even"),
        ({"max_delta": 0.0}, r"max_delta = 0.0: must lie in \(0, 2\]"),
    ],
)
def test_a_config_that_cannot_work_says_why(wrong, message):
    with pytest.raises(ValueError, match=message):
        rlpd.Config(**wrong)


# ------------------------------------------------------------------ from records to a policy

POINT = rlpd.Config(
    ensemble=2, hidden=(32, 32), batch=64, utd=8, max_delta=0.4, gamma=0.9, critic_lr=3e-3, actor_lr=3e-3,
    temp_lr=3e-3, tau=0.02, init_temperature=0.1,
)  # fmt: skip


def point_replay(seed):
    """Random driving of a point on a line: x' = x + 0.2 a, reward -|x'|."""
    rng, replay = np.random.default_rng(seed), Replay(5000, 2, 1, gamma=POINT.gamma)
    for _ in range(50):
        x, prev = rng.uniform(-1, 1), 0.0
        for i in range(21):
            action = np.clip(rng.uniform(prev - 0.4, prev + 0.4), -1, 1)
            nxt = x + 0.2 * action
            replay.add(
                "point",
                SimpleNamespace(
                    obs=[x, prev], prev_action=[prev], action=None if i == 20 else [action], reward=-abs(nxt),
                    terminated=False, truncated=i == 19, train=True,
                ),
            )  # fmt: skip
            x, prev = nxt, action
    return replay


def train_point(updates):
    online, prior, rng = point_replay(1), point_replay(2), np.random.default_rng(3)
    state = rlpd.init(POINT, jax.random.key(4), 2, 1)
    half = POINT.utd * POINT.batch // 2
    for _ in range(updates):
        batch = symmetric(online.sample(rng, half), prior.sample(rng, half))
        state, _ = rlpd.update(POINT, state, minibatches(batch, POINT.utd, POINT.batch))
    return state


def test_the_same_seed_and_records_give_the_same_weights_to_the_bit():
    first, second = train_point(5), train_point(5)
    for a, b in zip(jax.tree.leaves(first[:-1]), jax.tree.leaves(second[:-1]), strict=True):
        np.testing.assert_array_equal(a, b)
    params = rlpd.policy_params(POINT, first)
    assert sorted(params) == [
        f"{layer}/{name}" for layer in ("dense0", "dense1", "log_std", "mean") for name in ("bias", "kernel")
    ]
    kernel = params["dense0/kernel"].copy()
    rlpd.update(POINT, first, minibatches(point_replay(1).sample(np.random.default_rng(0), 512), 8, 64))
    np.testing.assert_array_equal(params["dense0/kernel"], kernel)  # not a view of what update consumes
    assert rlpd.policy_spec(POINT, second) == {
        "observation_size": 2, "action_size": 1, "hidden": [32, 32], "max_delta": 0.4,
    }  # fmt: skip


def test_a_point_learns_to_come_home_within_its_window():
    state = train_point(150)
    for start in (-1.0, -0.4, 0.5, 1.0):
        x, prev = start, np.zeros(1, np.float32)
        for _ in range(20):
            action = np.asarray(rlpd.act(POINT, state.actor, np.float32([x, prev[0]]), prev))
            x, prev = x + 0.2 * float(action[0]), action
        assert abs(x) < 0.1, f"from {start}: {x}"


def test_what_is_frozen_is_the_mean_of_the_actors_so_far_and_later_of_the_last_ones():
    state, batch = rlpd.init(POINT, jax.random.key(0), 2, 1), point_replay(1).sample(np.random.default_rng(0), 512)
    actors = []
    for _ in range(3):
        state, _ = rlpd.update(POINT, state, minibatches(batch, 8, 64))
        actors.append(rlpd.policy_params(POINT, state))
    for name, value in rlpd.policy_params(POINT, rlpd.frozen(state)).items():
        np.testing.assert_allclose(value, np.mean([a[name] for a in actors], axis=0), rtol=1e-4, atol=1e-6)
    assert rlpd.frozen(state).critic is state.critic
    many = state.actor_opt[0]._replace(count=jax.numpy.int32(10_000))
    before = rlpd.policy_params(POINT, rlpd.frozen(state))
    state, _ = rlpd.update(POINT, state._replace(actor_opt=(many, *state.actor_opt[1:])), minibatches(batch, 8, 64))
    newest, share = rlpd.policy_params(POINT, state), 1 / rlpd.AVERAGED
    for name, value in rlpd.policy_params(POINT, rlpd.frozen(state)).items():
        np.testing.assert_allclose(value, (1 - share) * before[name] + share * newest[name], rtol=1e-4, atol=1e-6)
