"""verl's plugin: its numbers against ipvrm's own, and every name it relies on against verl's wheel.

verl pins another transformers, so the wheel is read, not installed: `pip download --no-deps verl==0.9.1`, and
IPVRM_VERL_WHEEL names the file (`.ci/full` does).
"""

import ast
import os
import sys
import zipfile
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from ipvrm import IpvrmError
from ipvrm.integrations import verl as ours
from ipvrm.losses.advantages import AdvantageConfig, distrl_advantages
from ipvrm_kernels import clipped_surrogate

LENGTHS = (5, 1, 3, 4, 0, 7)  # of B = 6 responses; one is empty
PROMPTS = np.array(["b", "a", "b", "a", "c", "c"], dtype=object)
CONFIG = SimpleNamespace(gamma=1.0, lam=0.9)


@pytest.fixture
def batch():
    """(rewards (6, 8), mask (6, 8), td (20,), outcome (6,), cu_seqlens (7,))."""
    torch.manual_seed(0)
    lengths = torch.tensor(LENGTHS)
    mask = torch.arange(8) < lengths[:, None]
    mask[5, 2], mask[5, 7] = False, True  # a tool's tokens inside a response
    outcome = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 1.0])
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    td = torch.randn(int(lengths.sum()))
    ends = cu_seqlens[1:][lengths > 0].long() - 1
    td[ends] = 0.0
    rewards = torch.full((6, 8), torch.nan)  # what is not a response token is never read
    packed = td.clone()
    packed[ends] = outcome[lengths > 0]
    rewards[mask] = packed
    return rewards, mask, td, outcome, cu_seqlens


@pytest.mark.parametrize("preset", ["paper", "release"])
def test_advantages_are_ours(batch, preset):
    rewards, mask, td, outcome, cu_seqlens = batch
    config = replace(AdvantageConfig.preset(preset), lam=0.9)
    group = torch.tensor([1, 0, 1, 0, 2, 2])
    want = distrl_advantages(td, td.new_empty(20, 0), outcome, cu_seqlens, group, 3, config=config)
    got = ours.advantages(rewards, mask.long(), PROMPTS, config=config)
    assert torch.equal(got[mask], want.advantages) and not got[~mask].any()
    assert want.advantages.unique().numel() > 10


def test_an_outcome_that_holds_a_kl_term_is_refused(batch):
    rewards, mask, *_ = batch
    with pytest.raises(ValueError, match="outcome must be 0 or 1"):
        ours.advantages(rewards - 0.01, mask, PROMPTS, config=AdvantageConfig())


class Actor(SimpleNamespace):
    """verl's config of an actor, as far as it is read."""

    def get(self, name, default=None):
        return getattr(self, name, default)


def actor(**changes):
    given = {"clip_ratio": 0.2, "clip_ratio_low": None, "clip_ratio_high": 0.3, "clip_ratio_c": 3.0}
    return Actor(**(given | {"global_batch_info": {}} | changes))


def test_policy_loss_is_clipped_surrogate():
    torch.manual_seed(1)
    old, advantages = torch.randn(4, 6), 3 * torch.randn(4, 6)
    new = (old + torch.randn(4, 6)).requires_grad_()
    mask = torch.rand(4, 6) < 0.7
    loss, metrics = ours.policy_loss(new, old, advantages, mask, actor())
    want = clipped_surrogate(new, old, advantages, clip_low=0.2, clip_high=0.3, dual_clip=3.0)
    assert torch.equal(loss, want.loss)
    means = [float(x[mask].float().mean()) for x in (want.clipped, old - new.detach(), want.dual_clipped)]
    assert list(metrics.values()) == pytest.approx(means, abs=1e-6) and 0 < means[0] < 1 and means[2] > 0
    assert list(metrics) == ["actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower"]


# -------------------------------------------------------------------------------- the plugin, a stand-in verl


@pytest.fixture
def stand_in(monkeypatch):
    """Modules of verl's names, with registries that hold what is registered."""
    found = SimpleNamespace(adv={}, loss={}, managers={})

    def into(registry):
        return lambda name: lambda value: registry.setdefault(name, value)

    def module(name, **values):
        made = ModuleType(name)
        vars(made).update(values)
        monkeypatch.setitem(sys.modules, name, made)

    def agg_loss(loss_mat, loss_mask, loss_agg_mode, **_):
        assert loss_agg_mode == "token-mean"
        return (loss_mat * loss_mask).sum() / loss_mask.sum()

    class Base:
        def __init__(self, config, tokenizer, compute_score):
            self.config, self.tokenizer, self.compute_score = config, tokenizer, compute_score

    manager = "verl.experimental.reward_loop.reward_manager"
    for name in ("verl", "verl.experimental", "verl.experimental.reward_loop", manager, "verl.utils"):
        module(name, __path__=[])
    for name in ("verl.trainer", "verl.trainer.ppo"):
        module(name, __path__=[])
    module(f"{manager}.base", RewardManagerBase=Base)
    module(f"{manager}.registry", register=into(found.managers))
    module("verl.utils.reward_score", default_compute_score=lambda **_: 1.0)
    registrars = {"register_adv_est": into(found.adv), "register_policy_loss": into(found.loss)}
    module("verl.trainer.ppo.core_algos", agg_loss=agg_loss, **registrars)
    monkeypatch.delitem(sys.modules, ours.PLUGIN, raising=False)
    yield found
    sys.modules.pop(ours.PLUGIN, None)


def load_plugin():
    """As verl does it: by the entry point that pyproject.toml declares."""
    import tomllib

    pyproject = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    (entry,) = pyproject["project"]["entry-points"]["verl.plugins"].items()
    return EntryPoint(*entry, group="verl.plugins").load()


def test_the_plugin_registers_what_verl_then_calls(stand_in, batch):
    plugin = load_plugin()
    assert plugin.__name__ == ours.PLUGIN
    assert (set(stand_in.adv), set(stand_in.loss), set(stand_in.managers)) == (
        {"ipvrm", "ipvrm_release"},
        {"ipvrm"},
        {"ipvrm"},
    )
    rewards, mask, *_ = batch
    called = {"token_level_rewards": rewards, "response_mask": mask, "config": CONFIG, "index": PROMPTS}
    for name, preset in ours.ESTIMATORS.items():
        found, returns = stand_in.adv[name](**called, reward_baselines=None)
        config = replace(AdvantageConfig.preset(preset), lam=0.9)
        assert torch.equal(found, ours.advantages(rewards, mask, PROMPTS, config=config)) and returns is found
    with pytest.raises(IpvrmError, match="verl must give the prompts' uid"):
        stand_in.adv["ipvrm"](rewards, mask, config=CONFIG)
    old, advantages = torch.zeros(6, 8), torch.ones(6, 8)
    new = torch.full((6, 8), 0.1, requires_grad=True)
    kwargs = {"response_mask": mask, "loss_agg_mode": "token-mean", "config": actor()}
    loss, _ = stand_in.loss["ipvrm"](old_log_prob=old, log_prob=new, advantages=advantages, **kwargs)
    twice, _ = stand_in.loss["ipvrm"](
        old_log_prob=old, log_prob=new, advantages=advantages, rollout_is_weights=2 * advantages, **kwargs
    )
    assert float(loss) == pytest.approx(-np.exp(0.1)) and float(twice) == pytest.approx(2 * float(loss))
    loss.backward()
    assert bool(new.grad[mask].all()) and not new.grad[~mask].any()


def test_the_rewards_of_a_batch_are_padded(stand_in):
    manager = load_plugin().DenseRewardManager
    data = SimpleNamespace(batch={"responses": torch.zeros(2, 5, dtype=torch.long)})
    found = manager.assemble_rm_scores(data, [[0.5, 1.0], [0.1, 0.2, 0.0]])
    assert torch.equal(found, torch.tensor([[0.5, 1, 0, 0, 0], [0.1, 0.2, 0, 0, 0]]))


def test_rewards_of_a_response_are_the_td_and_the_outcome(stand_in, monkeypatch):
    import asyncio

    plugin = load_plugin()
    seen = {}

    class Served:
        info = SimpleNamespace(beta=10.0)
        tokenizer = SimpleNamespace(get_vocab=lambda: {"a": 0})

        def token_log_ratios(self, responses):
            seen["response"] = responses[0]
            return [torch.tensor([0.1, -0.2, 0.3])]

    def from_pretrained(folder, servers):
        seen["given"] = (folder, servers)
        return Served()

    monkeypatch.setattr(plugin.RewardModel, "from_pretrained", from_pretrained)
    given = {"reward_model": "rm", "engine": "http://a/v1", "reference_engine": "http://b/v1"}
    reward = {"reward_kwargs": {"ipvrm": given}}
    tokenizer = SimpleNamespace(get_vocab=lambda: {"a": 0}, decode=lambda ids, skip_special_tokens: str(ids))
    item = SimpleNamespace(
        batch={
            "prompts": torch.tensor([0, 0, 5, 6]),
            "responses": torch.tensor([7, 8, 9, 0]),
            "attention_mask": torch.tensor([0, 0, 1, 1, 1, 1, 1, 0]),
        },
        non_tensor_batch={"data_source": "s", "reward_model": {"ground_truth": "3"}},
    )

    async def run(outcome):
        scored = lambda **asked: seen.update(asked) or outcome  # noqa: E731
        manager = plugin.DenseRewardManager(SimpleNamespace(reward=reward), tokenizer, scored)
        manager.loop = asyncio.get_running_loop()
        return await manager.run_single([item])

    found = asyncio.run(run({"score": 1}))
    assert found["reward_score"] == pytest.approx([1.0, -2.0, 1.0]) and found["reward_extra_info"] == {
        "acc": 1.0
    }
    assert seen["response"].input_ids == (5, 6, 7, 8, 9) and seen["response"].prompt_length == 2
    assert seen["given"] == ("rm", ("http://a/v1", "http://b/v1"))
    assert (seen["solution_str"], seen["ground_truth"]) == ("[7, 8, 9]", "3")
    with pytest.raises(IpvrmError, match="an outcome must be 0 or 1; the function gave 0.5"):
        asyncio.run(run(0.5))
    del given["engine"]
    with pytest.raises(IpvrmError, match="reward_kwargs.ipvrm: engine must be given"):
        asyncio.run(run(1))


# ------------------------------------------------------------------------------------------ a failure is loud


def test_a_failed_import_is_loud(stand_in, monkeypatch):
    versions = {"verl": "0.9.1"}
    monkeypatch.setattr("ipvrm.run_folder.installed_version", lambda name: versions.get(name, "absent"))
    assert "did not load the plugin: VERL_USE_EXTERNAL_PLUGINS" in ours.plugin_state()  # as verl's "none"
    assert ours.plugin_state() == "registered"  # by now it is
    ours.require()
    del sys.modules[ours.PLUGIN]
    monkeypatch.delattr(sys.modules["verl.trainer.ppo.core_algos"], "agg_loss")
    with pytest.raises(IpvrmError, match="verl: the plugin cannot be imported with verl 0.9.1 .*agg_loss"):
        ours.require()
    monkeypatch.setitem(sys.modules, "verl", None)
    with pytest.raises(IpvrmError, match="verl 0.9.1 cannot be imported"):
        ours.require()
    versions.clear()
    with pytest.raises(IpvrmError, match="verl: not installed"):
        ours.require()


def test_env_says_it(monkeypatch):
    import ipvrm.view.environment as environment

    monkeypatch.setattr(environment, "plugin_state", lambda: "the plugin cannot be imported: because")
    known = environment.installed_version
    monkeypatch.setattr(
        environment, "installed_version", lambda name: "0.9.1" if name == "verl" else known(name)
    )
    assert "\nverl        the plugin cannot be imported: because\n" in environment.report()


# ----------------------------------------------------------------------------------- the contract, by reading


@pytest.fixture(scope="module")
def wheel():
    path = os.environ.get("IPVRM_VERL_WHEEL")
    if path is None:
        pytest.skip("no verl; pip download --no-deps verl==0.9.1 and set IPVRM_VERL_WHEEL to the file")
    assert f"verl-{ours.VERSION}-" in path
    with zipfile.ZipFile(path) as archive:
        yield lambda name: ast.parse(archive.read(name).decode())


def function(tree, name):
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return next(node for node in ast.walk(tree) if isinstance(node, kinds) and node.name == name)


def parameters(tree, name):
    return [argument.arg for argument in function(tree, name).args.args]


def keywords(tree, inside, callee):
    """Keyword names of the call of `callee` in the function `inside`."""
    calls = [node for node in ast.walk(function(tree, inside)) if isinstance(node, ast.Call)]
    (call,) = [c for c in calls if ast.unparse(c.func).rpartition(".")[2] == callee]
    return [keyword.arg for keyword in call.keywords]


CORE = "verl/trainer/ppo/core_algos.py"
MANAGER = "verl/experimental/reward_loop/reward_manager"


def test_contract_of_the_estimator(wheel):
    core = wheel(CORE)
    assert parameters(core, "register_adv_est") == ["name_or_enum"]
    source = ast.unparse(function(wheel("verl/trainer/ppo/ray_trainer.py"), "compute_advantage"))
    for given in (
        "'token_level_rewards': ",
        "'response_mask': ",
        "'config': config",
        "adv_kwargs['index'] = ",
    ):
        assert given in source
    assert "adv_estimator_fn(**adv_kwargs)" in source and "advantages, returns = adv_estimator_fn" in source
    algorithm = ast.unparse(wheel("verl/trainer/config/algorithm.py"))
    assert "gamma: float" in algorithm and "lam: float" in algorithm


def test_contract_of_the_policy_loss(wheel):
    core = wheel(CORE)
    assert parameters(core, "register_policy_loss") == ["name"]
    names = ["old_log_prob", "log_prob", "advantages", "response_mask", "loss_agg_mode", "config"]
    names.append("rollout_is_weights")
    assert parameters(core, "compute_policy_loss_vanilla") == names
    assert keywords(wheel("verl/workers/utils/losses.py"), "ppo_loss", "policy_loss_fn") == names
    assert {"loss_mat", "loss_mask", "loss_agg_mode"} <= set(parameters(core, "agg_loss"))
    vanilla = ast.unparse(function(core, "compute_policy_loss_vanilla"))
    for read in ("clip_ratio", "clip_ratio_low", "clip_ratio_high", "global_batch_info"):
        assert f"config.{read}" in vanilla
    assert "config.get('clip_ratio_c'" in vanilla
    for metric in ("actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower"):
        assert f"'{metric}'" in vanilla


def test_contract_of_the_reward_manager(wheel):
    base, loop = wheel(f"{MANAGER}/base.py"), wheel("verl/experimental/reward_loop/reward_loop.py")
    assert parameters(base, "__init__") == ["self", "config", "tokenizer", "compute_score"]
    assert parameters(base, "assemble_rm_scores") == ["cls", "data", "scores"]
    assert isinstance(function(base, "run_single"), ast.AsyncFunctionDef)
    assert parameters(wheel(f"{MANAGER}/registry.py"), "register") == ["name"]
    source = ast.unparse(loop)
    assert "item['reward_score'] for item in outputs_flat" in source
    assert "reward_manager_cls.assemble_rm_scores(data, scores)" in source
    assert keywords(loop, "_init_reward_fn", "load_reward_manager") == [
        "reward_router_address",
        "reward_model_tokenizer",
    ]
    assert "default_compute_score" in {
        node.name for node in ast.walk(wheel("verl/utils/reward_score/__init__.py")) if hasattr(node, "name")
    }


def test_contract_of_the_plugin_group(wheel):
    """It loads the entry points of the group, behind DataProto, and hides what that raises."""
    source = ast.unparse(wheel("verl/__init__.py"))
    assert "_entry_points(group='verl.plugins')" in source and "_ep.load()" in source
    assert source.index("import DataProto") < source.index("_ep.load()")
    assert ".debug(\"Failed to load plugin '%s': %s\"" in source


# ------------------------------------------------------------------------------------ verl itself, installed


@pytest.mark.full
def test_verl_itself(batch):
    """In an environment of verl's own, with ipvrm installed beside it: what its registries hold by then."""
    core = pytest.importorskip("verl.trainer.ppo.core_algos", reason="verl is not installed")
    from verl import DataProto
    from verl.experimental.reward_loop.reward_manager.registry import get_reward_manager_cls
    from verl.trainer.config import AlgoConfig
    from verl.trainer.ppo.ray_trainer import compute_advantage
    from verl.workers.config import ActorConfig

    assert ours.plugin_state() == "registered"  # by the entry point, in verl's own import
    assert get_reward_manager_cls(ours.NAME) is sys.modules[ours.PLUGIN].DenseRewardManager
    rewards, mask, *_ = batch
    tensors = {"token_level_rewards": rewards, "response_mask": mask.long()}
    for name, preset in ours.ESTIMATORS.items():
        data = DataProto.from_dict(tensors=tensors, non_tensors={"uid": PROMPTS})
        found = compute_advantage(data, name, config=AlgoConfig(gamma=1.0, lam=0.9)).batch["advantages"]
        config = replace(AdvantageConfig.preset(preset), lam=0.9)
        assert torch.equal(found, ours.advantages(rewards, mask, PROMPTS, config=config)) and found.any()
    config = ActorConfig(strategy="fsdp", ppo_micro_batch_size_per_gpu=1, rollout_n=1, clip_ratio_high=0.3)
    old, advantages = torch.randn(6, 8), 3 * torch.randn(6, 8)
    new = (old + torch.randn(6, 8)).requires_grad_()
    kwargs = {"old_log_prob": old, "log_prob": new, "advantages": advantages, "response_mask": mask}
    kwargs |= {"loss_agg_mode": "token-mean", "config": config, "rollout_is_weights": torch.rand(6, 8)}
    results = [core.get_policy_loss_fn(name)(**kwargs) for name in (ours.NAME, "vanilla")]
    (mine, metrics), (theirs, of_theirs) = results
    assert float(mine) == pytest.approx(float(theirs), rel=1e-5)
    assert metrics == pytest.approx(of_theirs, rel=1e-5, abs=1e-6)
    gradients = [torch.autograd.grad(loss, new)[0] for loss in (mine, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)
