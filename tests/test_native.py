"""The critics' updates in compiled code of our own: the same numbers as the plain ones, and what can go wrong."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest

jax = pytest.importorskip("jax")

from tether.agents import native, rlpd, sac  # noqa: E402
from tether.agents.native import NativeError  # noqa: E402

from tests import reference  # noqa: E402
from tests.reference import ACT, OBS, batches_of, flat, moved, relative  # noqa: E402

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, native.COMPILERS)), reason=f"needs one of {native.COMPILERS}"
)

# no size is a multiple of a vector, of a tile's rows or of its columns
ODD = dict(hidden=(30, 17), batch=38, utd=1, tau=0.1)
CASES = {  # every switch on and off, a subset of the ensemble and all of it
    "two": rlpd.Config(**ODD, ensemble=2),
    "ten": rlpd.Config(**ODD, ensemble=10, subset=2),
    "two, no norm": rlpd.Config(**ODD, ensemble=2, layer_norm=False),
    "ten, no norm": rlpd.Config(**ODD, ensemble=10, subset=2, layer_norm=False),
    "dropout": rlpd.Config(**ODD, ensemble=3, subset=2, dropout=0.25, adam_b1=0.5),
    "dropout, no norm": rlpd.Config(**ODD, ensemble=2, layer_norm=False, dropout=0.01),
    "whole tiles": rlpd.Config(**ODD | {"batch": 24, "hidden": (64, 32)}, ensemble=2),
    "five updates": rlpd.Config(**ODD | {"batch": 12, "hidden": (30,), "utd": 5}, ensemble=3, subset=2, critic_lr=1e-3),
}


def inputs(cfg, seed=0):
    """A state, and what else `sac.fit_all` takes."""
    made = jax.eval_shape(partial(rlpd.init, cfg, obs_size=OBS, action_size=ACT), jax.random.key(0))
    rng = np.random.default_rng(seed)
    draw = lambda x: (rng.standard_normal(x.shape) / np.sqrt(x.shape[-2])).astype(x.dtype)  # noqa: E731
    critic, target = jax.tree.map(draw, (made.critic, made.target))
    opt = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), made.critic_opt)
    state = made._replace(critic=critic, target=target, critic_opt=opt)
    batches = batches_of(cfg, cfg.utd, seed)
    next_action = rng.uniform(-1, 1, (cfg.utd, cfg.batch, ACT)).astype(np.float32)
    bonus = rng.standard_normal((cfg.utd, cfg.batch)).astype(np.float32)
    return state, batches, next_action, bonus, jax.random.split(jax.random.key(seed), cfg.utd)


@cache
def compiled(case, made_native):
    """The critics' updates of a case, from what `inputs` gives."""
    cfg = CASES[case]
    cfg = replace(cfg, native=True) if made_native else cfg
    fit = rlpd._fit_all if made_native else partial(sac.fit_all, sac.Critic(rlpd._make, rlpd._fit, rlpd._value))
    inner = jax.jit(
        lambda critic, target, opt, *rest: fit(
            cfg, sac.State(*[None] * 10)._replace(critic=critic, target=target, critic_opt=opt), *rest
        )
    )
    return lambda state, *rest: inner(state.critic, state.target, state.critic_opt, *rest)


@pytest.mark.parametrize("case", CASES)
def test_losses_values_and_gradients_are_those_of_the_plain_updates(case):
    cfg, given = CASES[case], inputs(CASES[case])
    plain, made = compiled(case, False)(*given), compiled(case, True)(*given)
    # from the second update on, weights differ by what Adam makes of rounding in gradients near 0
    limit = 1e-5 if cfg.utd == 1 else 1e-4
    for want, got in zip(plain[3:], made[3:], strict=True):
        assert got.shape == (cfg.utd,)
        np.testing.assert_allclose(got, want, rtol=limit)
    want, got = plain[2][0], made[2][0]
    for name, value in flat({"params": got.mu}).items():
        assert relative(value, flat({"params": want.mu})[name]) <= limit, name
        assert relative(flat({"params": got.nu})[name], flat({"params": want.nu})[name]) <= 2 * limit, name
    assert int(got.count) == cfg.utd
    for kind in (0, 1):  # critic and target
        for name, value in flat(made[kind]).items():
            np.testing.assert_allclose(
                value, flat(plain[kind])[name], rtol=1e-5, atol=2e-6 if cfg.utd == 1 else 1e-4, err_msg=name
            )


WHOLE = rlpd.Config(
    hidden=(16, 12), batch=8, utd=2, ensemble=3, subset=2, dropout=0.25, max_delta=0.3, init_temperature=0.7
)


def test_an_update_with_it_equals_numpy():
    cfg = replace(WHOLE, native=True)
    state, _ = reference.check_update(reference.Rlpd(), rlpd, cfg)
    assert int(state.critic_opt[0].count) == 2
    assert "tether_update" in rlpd.update.lower(cfg, state, batches_of(cfg, 2)).as_text()


def test_updates_with_it_go_on_from_their_own_state_and_consume_that():
    """Four in two groups, in a scan, are two calls of two."""
    calls, scan = replace(WHOLE, native=True), replace(WHOLE, native=True, utd=4, actor_every=2)
    batches = batches_of(scan, 4)
    start = jax.tree.map(np.array, moved(rlpd.init(calls, jax.random.key(0), OBS, ACT))._replace(key=None))
    state = start._replace(key=jax.random.key(1))
    for u in (0, 2):
        before = state
        state, _ = rlpd.update(calls, state, {name: value[u : u + 2] for name, value in batches.items()})
    assert all(x.is_deleted() for x in jax.tree.leaves((before.critic, before.target, before.critic_opt)))
    assert int(state.critic_opt[0].count) == int(state.updates) == 4
    other, _ = rlpd.update(scan, start._replace(key=jax.random.key(1)), batches)
    assert jax.tree.structure(state) == jax.tree.structure(other)
    for name in ("actor", "critic", "target"):
        for leaf, value in flat(getattr(other, name)).items():
            np.testing.assert_allclose(value, flat(getattr(state, name))[leaf], rtol=1e-4, atol=1e-5, err_msg=leaf)


@pytest.mark.parametrize("where", ["obs", "next_obs", "action", "reward", "discount", "member 0", "member 1"])
def test_what_is_not_a_number_stays_so(where):
    state, batches, *rest = inputs(CASES["two"])
    if where in batches:
        batches[where][0, 3] = np.nan
    else:  # one critic of the target's minimum
        state.target["params"]["value_bias"][int(where[-1])] = np.nan
    results = [compiled("two", made_native)(state, batches, *rest) for made_native in (False, True)]
    plain, made = ([np.isnan(x) for x in jax.tree.leaves(result)] for result in results)
    assert plain[-2].all()  # the loss
    for want, got in zip(plain, made, strict=True):
        np.testing.assert_array_equal(got, want)


def digest(case):
    """sha256 of all that the native update of a case makes."""
    leaves = jax.tree.leaves(compiled(case, True)(*inputs(CASES[case])))
    return hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in leaves)).hexdigest()


def child(code, **environment):
    """Run code in a process of its own, which has the cache of this one."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1],
        env=os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"} | environment,
    )  # fmt: skip


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="this process has one processor")
def test_one_processor_makes_the_same_numbers_as_several():
    one = min(os.sched_getaffinity(0))
    cases = ("ten", "five updates")
    done = child(
        f"import os; os.sched_setaffinity(0, {{{one}}})\n"
        f"from tests.test_native import digest\nfor case in {cases}: print(digest(case))"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [digest(case) for case in cases]


# ------------------------------------------------------------------ the library


@pytest.fixture
def library(tmp_path, monkeypatch):
    """The path of a copy of the built library, in a cache folder that the next `load` looks into."""
    native.load()
    (built,) = Path.home().glob(".cache/tether/native-*.so")  # a home of the tests' own: conftest
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # XLA takes a name once; the copy lies elsewhere in memory
    monkeypatch.setattr(jax.ffi, "register_ffi_target", lambda *_, **__: None)
    folder = tmp_path / "cache" / "tether"
    folder.mkdir(parents=True)
    native.load.cache_clear()
    yield Path(shutil.copy(built, folder))
    native.load.cache_clear()


def compiler(path, monkeypatch, does):
    """A shell script in place of the compiler; its last argument is the file to make."""
    path.write_text(f'#!/bin/sh\nfor file; do :; done\n{does}\n')
    path.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda _: str(path))


def test_it_is_built_once_and_only_the_cache_folder_is_written_to(library, monkeypatch, tmp_path):
    kept = shutil.move(library, tmp_path / "kept.so")
    compiler(tmp_path / "c++", monkeypatch, f'echo once >> {tmp_path}/log; cp {kept} "$file"')
    here = sorted(Path.home().rglob("*"))
    for _ in range(3):
        native.load()
        native.load.cache_clear()
    assert (tmp_path / "log").read_text() == "once\n"
    assert [*library.parent.iterdir()] == [library]
    assert sorted(Path.home().rglob("*")) == here


def test_without_a_compiler_it_says_what_is_missing(library, monkeypatch):
    library.unlink()
    monkeypatch.setattr(shutil, "which", lambda _: None)
    cfg = replace(WHOLE, native=True, tau=0.3)  # settings alone need none: nor do an evaluation and an export
    state = jax.eval_shape(partial(rlpd.init, cfg, obs_size=OBS, action_size=ACT), jax.random.key(0))
    batches = batches_of(cfg, 2)
    with pytest.raises(NativeError, match=r"agent.native needs a C\+\+ compiler, c\+\+ or .*; install one"):
        rlpd.update.lower(cfg, state, batches)
    rlpd.update.lower(replace(cfg, native=False), state, batches)


def test_a_compiler_that_fails_is_quoted(library, monkeypatch, tmp_path):
    library.unlink()
    compiler(tmp_path / "c++", monkeypatch, "echo no such header >&2; exit 1")
    with pytest.raises(NativeError, match=r"c\+\+ -std=.* failed: no such header"):
        native.load()
    assert [*library.parent.iterdir()] == []


def test_a_cache_folder_that_cannot_be_is_named(library, monkeypatch, tmp_path):
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    with pytest.raises(NativeError, match=f"agent.native: {file}/tether: .*[Nn]ot a directory"):
        native.load()


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_a_library_cut_short_is_named_and_not_loaded(library, share):
    whole = library.read_bytes()
    library.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(NativeError, match=f"agent.native: {library}: damaged; remove it"):
        native.load()
    library.write_bytes(whole)
    native.load()  # what failed is not kept
