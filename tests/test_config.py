"""Presets, overlays, --set, and what a run was decided by."""

from __future__ import annotations

import dataclasses

import pytest
from tether.launch import catalog, config
from tether.launch.config import ConfigError

pytest.importorskip("jax")  # the algorithm says itself what it takes


def test_full_is_rlpd_as_published():
    found = config.load("full", "gym")
    want = dict(
        ensemble=10, subset=2, hidden=(256, 256), critic_lr=3e-4, actor_lr=3e-4, temp_lr=3e-4, tau=0.005,
        gamma=0.99, n_step=1, init_temperature=1.0, target_entropy=None, backup_entropy=True, batch=256,
        utd=20, max_delta=None, layer_norm=True, actor_hidden=None, adam_b1=0.9, actor_every=None, dropout=0.0,
        native=False, bound_start=None, bound_end=0.6, bound_steps=30_000, bound_weight=12.0, surprise=1.5,
        relative=False,
    )  # fmt: skip
    assert dict(found.agent) == want
    assert found.algorithm == "rlpd"
    assert found.learner.start_steps == 5000 and found.actor.random_steps == 5000


def test_cpu_differs_from_full_only_where_its_file_says_so():
    full, cpu = config.load("full", "course"), config.load("cpu", "course")
    text = (config._SHIPPED / "cpu.toml").read_text()
    changed = {k for k in full.agent if full.agent[k] != cpu.agent[k]}
    assert "ensemble" in changed
    for key in changed:
        assert f"\n{key} = " in text


@pytest.mark.parametrize("preset", config.presets())
@pytest.mark.parametrize("family", config.FAMILIES)
def test_every_preset_loads_for_every_family_and_survives_its_file(preset, family, tmp_path):
    wanted = config.load(preset, family)
    facts = {"task": '[task]\nrobot = "car" # \\ é\n', "seed": 3, "name": "it's \"x\"\x7f\nend", "cut": True}
    (tmp_path / "config.toml").write_text(config.dump(wanted, **facts), encoding="utf-8")
    found, head = config.read(tmp_path)
    assert found == wanted
    assert {k: head[k] for k in facts} == facts
    assert head["format"] == config.RUN_FORMAT and head["git"]


def test_the_family_comes_from_the_task():
    course, gym = config.load("cpu", "course"), config.load("cpu", "gym")
    assert course.agent["max_delta"] == 0.2 and gym.agent["max_delta"] is None
    assert course.learner.start_steps < gym.learner.start_steps


def test_presets_stack_left_to_right_and_set_wins(tmp_path):
    mine = tmp_path / "mine.toml"
    mine.write_text(
        "[agent]\nutd = 7\ngamma = 0.9\ntau = 0.5\n"
        "[family.course.agent]\ngamma = 0.95\n[family.gym.agent]\ntau = 1\n"
    )
    found = config.load(f"cpu,{mine}", "course", ["agent.utd=9", "learner.snapshot_every_s=5"])
    assert found.agent["utd"] == 9 and found.agent["gamma"] == 0.95 and found.agent["ensemble"] == 2
    assert found.agent["tau"] == 0.5
    assert found.learner.snapshot_every_s == 5.0 and isinstance(found.learner.snapshot_every_s, float)


def test_set_takes_toml_values_and_bare_words():
    found = config.load(
        "cpu", "course",
        ["agent.hidden=[64, 64]", "agent.max_delta=none", 'agent.target_entropy="none"', "agent.gamma = 1",
         "agent.backup_entropy=false", "agent.algorithm=rlpd", "learner.steps=1_000"],
    )  # fmt: skip
    assert found.agent["hidden"] == (64, 64) and found.agent["max_delta"] is None
    assert found.agent["gamma"] == 1.0 and isinstance(found.agent["gamma"], float)
    assert found.agent["backup_entropy"] is False and found.learner.steps == 1000


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("agent.gama=0.9", "--set: agent.gama is no setting; valid are ensemble, hidden"),
        ("agnt.gamma=0.9", "--set: agnt is no setting; valid are agent, learner, actor"),
        ("agent.gamma=high", "--set: agent.gamma must be a number, not 'high'"),
        ("agent.gamma=true", "agent.gamma must be a number"),
        ("agent.gamma=nan", "agent.gamma must be a number"),
        ("agent.gamma=1.5", "[agent] gamma = 1.5: must lie between 0 and 1"),
        ("agent.max_delta='x'", "agent.max_delta must be a number or \"none\", not 'x'"),
        ("agent.utd=2.5", "agent.utd must be a whole number, not 2.5"),
        ("agent.utd=none", "agent.utd must be a whole number"),
        ("agent.subset=3", "[agent] subset = 3: must lie in 1 ... ensemble = 2"),
        ("agent.batch=255", "[agent] batch = 255: must be even"),
        ("agent.hidden=64", "agent.hidden must be a list of whole numbers"),
        ("agent.hidden=[64, 1.5]", "agent.hidden must be a list of whole numbers, not [64, 1.5]"),
        ("agent.hidden=[]", "agent.hidden must be a list of whole numbers, not []"),
        ("agent.backup_entropy=1", "agent.backup_entropy must be true or false, not 1"),
        ("agent=1", "write section.key=value"),
        ("learner.steps=0", "[learner] steps = 0: must be at least 1"),
        ("learner.prior_share=1.5", "[learner] prior_share = 1.5: must lie between 0 and 1"),
        ("learner.prior_share_end=-0.1", "[learner] prior_share_end = -0.1: must lie between 0 and 1"),
        ("actor.takeover=ghost", "[actor] takeover = 'ghost': must be one of none, script, keyboard, gamepad"),
        ("actor.takeover=1", "actor.takeover must be a text in quotes, not 1"),
        ("actor.takeover_quality=1.5", "[actor] takeover_quality = 1.5: must lie between 0 and 1"),
        ("learner.takeover_reward=yes", "learner.takeover_reward must be a number or \"none\", not 'yes'"),
        ("learner.held_out=1", "[learner] held_out = 1: nothing is left to train on; must be 0 or at least 2"),
        ("learner.prior_anneal=-1", "[learner] prior_anneal = -1: must be at least 0"),
        ("gamma=0.9", "write section.key=value"),
        ("agent.gamma", "write section.key=value"),
        ("agent.gamma=[", "agent.gamma must be a number, not '['"),
        ("family.course=1", "valid are agent, learner, actor"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_it(text, says):
    with pytest.raises(ConfigError) as caught:
        config.load("cpu", "course", [text])
    assert says in str(caught.value) and "\n" not in str(caught.value).replace(text, "")


def test_an_unknown_algorithm_is_named():
    for name in ("rlpf", "3", "[1]"):
        with pytest.raises(catalog.CatalogError, match="unknown algorithm .*; this installation has rlpd"):
            config.load("cpu", "course", [f"agent.algorithm={name}"])


def test_a_wrong_preset_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no preset 'fast'; give aprl, cpu, full, rlif, sim2real or the path"):
        config.load("fast", "course")
    for text, says in (
        ("[agent", "cannot be read as TOML"),
        ("agent = 3", "agent must be a table"),
        ("[agent]\nutdd = 3", r"mine\.toml: agent.utdd is no setting"),
        ("[family.swim.agent]\nutd = 3", r"mine\.toml: family.swim is no setting; valid are course"),
        ("family = 3", "family must be a table"),
        ("[family]\ncourse = 3", "must be a table"),
        ("[learner]\nsteps = 'all'", r"mine\.toml: learner.steps must be a whole number"),
    ):
        (tmp_path / "mine.toml").write_text(text)
        with pytest.raises(ConfigError, match=says):
            config.load(str(tmp_path / "mine.toml"), "course")


def test_a_run_of_another_version_is_refused_in_one_line(tmp_path):
    with pytest.raises(ConfigError, match="not a run folder"):
        config.read(tmp_path)
    text = config.dump(config.load("cpu", "course"))
    for changed in (text.replace("format = 1", "format = 2"), text.replace("[run]", "[ran]"), "run = 3\n"):
        (tmp_path / "config.toml").write_text(changed)
        with pytest.raises(ConfigError, match="this version reads 1; open it with the version that made it"):
            config.read(tmp_path)
    (tmp_path / "config.toml").write_text(text.replace("utd = 4", "utd = 'x'"))
    with pytest.raises(ConfigError, match=r"config\.toml: agent.utd must be a whole number"):
        config.read(tmp_path)
    (tmp_path / "config.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read as TOML"):
        config.read(tmp_path)


def test_an_algorithm_that_plugs_in_says_what_it_takes(monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Theirs:
        gamma: float = 0.5
        width: int = 3
        style: str = "plain"

    monkeypatch.setattr(catalog, "algorithm", lambda name: type("Module", (), {"Config": Theirs}))
    found = config.load("cpu", "gym", ["agent.algorithm=theirs", "agent.width=5"])
    assert found.algorithm == "theirs"
    assert dict(found.agent) == {"gamma": 0.5, "width": 5, "style": "plain"}  # presets' [agent] is for rlpd
    assert config.load("cpu", "course", ["agent.algorithm=theirs"]).agent["gamma"] == 0.95  # families are for all
    with pytest.raises(ConfigError, match="agent.utd is no setting; valid are gamma, width, style"):
        config.load("cpu", "gym", ["agent.algorithm=theirs", "agent.utd=5"])


def test_an_algorithm_keeps_its_own_numbers_whatever_preset():
    own = catalog.algorithm("crossq").Config()
    for preset in ("full", "cpu"):
        found = config.load(preset, "gym", ["agent.algorithm=crossq"])
        assert found.agent == dataclasses.asdict(own)
    driving = config.load("cpu", "course", ["agent.algorithm=crossq"])
    assert driving.agent["max_delta"] == 0.2 and driving.agent["hidden"] == own.hidden


def test_a_familys_table_that_names_an_algorithm_is_for_that_one(tmp_path):
    (tmp_path / "mine.toml").write_text('[family.gym.agent]\nalgorithm = "xqc"\ngamma = 0.9\natoms = 51\n')
    found = config.load(f"cpu,{tmp_path}/mine.toml", "gym")
    assert (found.algorithm, found.agent["atoms"], found.agent["gamma"]) == ("xqc", 51, 0.9)
    other = config.load(f"cpu,{tmp_path}/mine.toml", "gym", ["agent.algorithm=rlpd"])
    assert other.agent["gamma"] == 0.99 and other.agent["hidden"] == (128, 128)
    assert config.load(f"cpu,{tmp_path}/mine.toml", "course").algorithm == "rlpd"


def test_a_preset_that_names_an_algorithm_is_for_that_one(tmp_path):
    (tmp_path / "mine.toml").write_text('[agent]\nalgorithm = "xqc"\natoms = 51\n[family.gym.agent]\ngamma = 0.9\n')
    found = config.load(f"cpu,{tmp_path}/mine.toml", "gym")
    assert (found.algorithm, found.agent["atoms"], found.agent["gamma"]) == ("xqc", 51, 0.9)
    assert found.agent["hidden"] == catalog.algorithm("xqc").Config().hidden
    other = config.load(f"cpu,{tmp_path}/mine.toml", "gym", ["agent.algorithm=rlpd"])
    assert other.agent["gamma"] == 0.9 and other.agent["hidden"] == (128, 128)


def test_aprl_and_sim2real_stand_on_another_preset():
    plain, bound, on = (config.load(f"cpu{more}", "walk") for more in ("", ",aprl", ",sim2real"))
    assert bound.algorithm == on.algorithm == plain.algorithm
    assert dict(bound.agent) == dict(plain.agent) | {"bound_start": 0.35, "target_entropy": -12.0}
    assert bound.actor.random_bound == 0.35
    assert dict(on.agent) == dict(plain.agent) | {"actor_lr": 1e-5, "actor_every": 20}
    assert on.learner.prior_anneal == 12_500 and on.actor == plain.actor


def test_rlif_pays_for_nothing_but_takeovers():
    plain, paid = config.load("cpu", "manipulate"), config.load("cpu,rlif", "manipulate")
    assert plain.learner == dataclasses.replace(paid.learner, takeover_reward=None) != paid.learner
    assert paid.learner.takeover_reward == -1.0 and plain.actor == paid.actor
    assert dict(paid.agent) == dict(plain.agent) | {"backup_entropy": False}


@pytest.mark.parametrize("wrong", [0, 1.5])
def test_a_bound_of_random_actions_that_cannot_be_is_named(wrong):
    with pytest.raises(ConfigError, match=rf"\[actor\] random_bound = {wrong}: must"):
        config.load("cpu", "gym", [f"actor.random_bound={wrong}"])
