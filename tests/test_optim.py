"""Learning rates against closed forms; optimiser state through a checkpoint, bitwise."""

import copy
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ldm.config import OptimConfig
from ldm.training.averages import Average, exponential
from ldm.training.checkpoint import Checkpoint, CheckpointError, CheckpointStore
from ldm.training.optim import build_optimizer, flatten_optimizer, learning_rate, restore_optimizer
from ldm.training.state import load_trained, restore_training, training_state

from .table import table


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rates(total: int, **settings: object) -> list[float]:
    config = OptimConfig(learning_rate=1.0, **settings)
    return [learning_rate(step, total, config) for step in range(total)]


def test_constant_is_constant():
    assert rates(5) == [1.0] * 5


def test_warm_up_is_linear_and_full_at_its_last_step():
    assert rates(6, warmup_steps=4) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1], rel=1e-12)


def test_linear_decay_is_a_straight_line_to_the_final_fraction():
    assert rates(5, decay="linear") == pytest.approx([1, 0.75, 0.5, 0.25, 0], abs=1e-12)
    assert rates(5, decay="linear", final_fraction=0.2) == pytest.approx([1, 0.8, 0.6, 0.4, 0.2], rel=1e-12)
    assert rates(7, decay="linear", warmup_steps=2) == pytest.approx([0.5, 1, 1, 0.75, 0.5, 0.25, 0], abs=1e-12)


def test_cosine_decay_is_half_a_cosine_to_the_final_fraction():
    found = rates(101, decay="cosine", final_fraction=0.1)
    expected = [0.1 + 0.9 * math.cos(math.pi * step / 200) ** 2 for step in range(101)]
    assert found == pytest.approx(expected, rel=1e-12)
    assert found[-1] == 0.1


@table("decay", ["linear", "cosine"])
def test_decay_ends_exactly_on_the_final_fraction_of_the_setting(decay):
    config = OptimConfig(learning_rate=3e-4, decay=decay, warmup_steps=9, final_fraction=0.5)
    assert learning_rate(9, 1000, config) == pytest.approx(3e-4, rel=1e-12)
    assert learning_rate(999, 1000, config) == pytest.approx(1.5e-4, rel=1e-12)
    assert learning_rate(9, 10, config) == pytest.approx(1.5e-4, rel=1e-12)  # the only step after the warm-up


@table("fraction", [0.001, 0.2, 0.5, 1])
def test_a_decay_over_the_last_part_is_the_constant_rate_before_it_and_a_whole_decay_in_it(fraction):
    found = rates(200, decay="linear", warmup_steps=10, decay_fraction=fraction)
    start = min(199, max(10, round((1 - fraction) * 200)))
    assert found[10:start] == [1.0] * (start - 10)
    assert found[start:] == (rates(200 - start, decay="linear") if start < 199 else [0.0])
    decided = OptimConfig(learning_rate=1.0, decay="linear", warmup_steps=10, decay_fraction=0.7)
    assert found == [learning_rate(step, 200, decided, decay_start=start) for step in range(200)]
    assert found[:start] == [learning_rate(step, None, decided) for step in range(start)]  # before it is known


def test_a_constant_run_may_end_in_its_warm_up():
    assert rates(2, warmup_steps=100) == pytest.approx([0.01, 0.02], rel=1e-12)


@table(
    ("step", "total", "settings", "message"),
    [
        (5, 5, {}, "global_step: got 5; expected 0 to 4, of 5 steps"),
        (-1, 5, {}, "global_step: got -1"),
        (0, 5, {"learning_rate": 0.0}, r"optim\.learning_rate: got 0\.0; expected a positive number"),
        (0, 5, {"learning_rate": math.nan}, r"optim\.learning_rate: got nan"),
        (0, 5, {"learning_rate": math.inf}, r"optim\.learning_rate: got inf"),
        (0, 5, {"warmup_steps": -1}, r"optim\.warmup_steps: got -1; expected 0"),
        (0, 5, {"final_fraction": 1.5}, r"optim\.final_fraction: got 1\.5; expected 0 to 1"),
        (0, 5, {"decay_fraction": 0.0}, r"optim\.decay_fraction: got 0\.0; expected above 0, to 1"),
        (-1, None, {}, "global_step: got -1; expected 0 or more"),
        (0, 5, {"decay": "cosine", "warmup_steps": 5}, "leaves none of 5 steps for decay: cosine"),
    ],
)
def test_impossible_schedules_are_refused(step, total, settings, message):
    with pytest.raises(ValueError, match=message):
        learning_rate(step, total, replace(OptimConfig(), **settings))


def test_only_weights_decay():
    module = nn.Sequential(nn.Conv2d(2, 3, 3), nn.GroupNorm(3, 3), nn.Flatten(), nn.Linear(3, 2))
    for parameter in module.parameters():
        nn.init.constant_(parameter, 2.0)
        parameter.grad = torch.zeros_like(parameter)
    build_optimizer(module.parameters(), OptimConfig(learning_rate=0.1, weight_decay=0.5)).step()
    for name, parameter in module.named_parameters():
        shrunk = 2.0 * (1 - 0.1 * 0.5) if name in ("0.weight", "3.weight") else 2.0
        assert torch.allclose(parameter, torch.tensor(shrunk)), name


def test_adamw_has_the_configs_settings_and_takes_its_first_step_of_one_learning_rate():
    parameter = nn.Parameter(torch.zeros(3, 2))
    config = OptimConfig(learning_rate=0.25, betas=(0.8, 0.7), eps=1e-12)
    optimizer = build_optimizer([parameter], config)
    assert [group["betas"] for group in optimizer.param_groups] == [(0.8, 0.7)] * 2
    parameter.grad = torch.tensor([[1.0, -2.0], [3.0, -4.0], [5.0, 6.0]])
    optimizer.step()
    assert torch.allclose(parameter, -0.25 * parameter.grad.sign())  # Kingma & Ba 2015, section 2.1


def test_steps_are_fused_only_where_no_gradient_scaler_can_be(monkeypatch):
    for accelerator, fused in ((False, True), (True, None)):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda accelerator=accelerator: accelerator)
        optimizer = build_optimizer([nn.Parameter(torch.zeros(2))], OptimConfig())
        assert optimizer.param_groups[0]["fused"] is fused


def test_frozen_parameters_are_left_out():
    module = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2))
    groups = build_optimizer(module.parameters(), OptimConfig()).param_groups
    assert [[tuple(p.shape) for p in group["params"]] for group in groups] == [[(2, 2)], [(2,)]]
    with pytest.raises(ValueError, match="no parameter that requires grad"):
        build_optimizer(module[0].parameters(), OptimConfig())


def test_8_bit_says_what_it_needs(monkeypatch):
    config = OptimConfig(optimizer="adamw_8bit", learning_rate=0.5, weight_decay=0.1)
    parameter = nn.Parameter(torch.zeros(2, 2))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match="needs bitsandbytes and a GPU; pip install bitsandbytes, or set"):
        build_optimizer([parameter], config)
    made = SimpleNamespace(AdamW8bit=lambda groups, **settings: (groups, settings))
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(optim=made))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="needs a GPU, there is none; train on one, or set"):
        build_optimizer([parameter], config)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    groups, settings = build_optimizer([parameter], config)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert settings == {"lr": 0.5, "betas": (0.9, 0.999), "eps": 1e-8}


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(16, 2))
    return module.to(dtype).to(memory_format=torch.channels_last)


def train(module: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(5, 3, 4, 4, generator=generator).to(next(module.parameters()).dtype)
        optimizer.zero_grad()
        module(images).square().mean().backward()
        optimizer.step()


def assert_same(ours: object, theirs: object, where: str = "state") -> None:
    """Assert that two nests of dicts and lists hold the same values, types, data types and strides."""
    assert type(ours) is type(theirs), where
    if isinstance(ours, torch.Tensor):
        assert (ours.dtype, ours.device, ours.stride()) == (theirs.dtype, theirs.device, theirs.stride()), where
        assert torch.equal(ours, theirs), where
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            assert_same(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), where
        for index, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_same(*pair, f"{where}[{index}]")
    else:
        assert ours == theirs, where


OPTIMIZERS = {
    "ours": lambda p: build_optimizer(p, OptimConfig(learning_rate=1e-2, weight_decay=0.1)),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "adamw foreach amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2),
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
}


@table("dtype", [torch.float32, torch.bfloat16])
@table("name", OPTIMIZERS)
def test_state_through_a_checkpoint_and_the_steps_after_it_are_bitwise_the_same(tmp_path, name, dtype):
    module = network(dtype)
    optimizer = OPTIMIZERS[name](module.parameters())
    train(module, optimizer, range(3))
    for group in optimizer.param_groups:
        group["lr"] = 0.1 + 0.2  # a float that needs all of its digits
    tensors, description = flatten_optimizer(optimizer)
    path = CheckpointStore(tmp_path, 1).save(3, {"optimizer": tensors}, {"optimizer": description})
    saved = CheckpointStore.load(path)

    other = copy.deepcopy(module)
    resumed = OPTIMIZERS[name](other.parameters())
    restore_optimizer(resumed, saved.tensors["optimizer"], saved.state["optimizer"])
    assert_same(resumed.state_dict(), optimizer.state_dict())
    train(module, optimizer, range(3, 6))
    train(other, resumed, range(3, 6))
    assert_same(dict(other.state_dict()), dict(module.state_dict()))
    assert_same(resumed.state_dict(), optimizer.state_dict())


def test_state_of_another_data_type_or_no_tensor_keeps_it_and_is_not_shared():
    parameter = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    first, second = torch.optim.AdamW([parameter]), torch.optim.AdamW([parameter])
    moments, codes = torch.randn(4), torch.arange(9, dtype=torch.uint8)
    first.state[parameter] = {"exp_avg": moments, "codes": codes, "step": 7, "flag": True, "none": None}
    restore_optimizer(second, *flatten_optimizer(first))
    assert_same(dict(second.state[parameter]), first.state[parameter] | {})
    second.state[parameter]["exp_avg"].zero_()
    assert moments.any()


def test_how_a_step_is_computed_stays_as_built():
    parameter = nn.Parameter(torch.zeros(2))
    fused, plain = (
        torch.optim.AdamW([parameter], fused=True),
        torch.optim.AdamW([parameter], lr=0.5, fused=False),
    )
    restore_optimizer(fused, *flatten_optimizer(plain))
    assert (fused.param_groups[0]["fused"], fused.param_groups[0]["lr"]) == (True, 0.5)


def test_a_state_of_no_steps_takes_the_steps_back():
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.ones(2)
    stepped, fresh = torch.optim.AdamW([parameter]), torch.optim.AdamW([parameter])
    stepped.step()
    restore_optimizer(stepped, *flatten_optimizer(fresh))
    assert_same(stepped.state_dict(), fresh.state_dict())


def state_of(optimizer: torch.optim.Optimizer) -> dict:
    return copy.deepcopy(optimizer.state_dict())


def test_another_models_state_is_refused_and_changes_nothing():
    def adamw(*shapes: tuple[int, ...]) -> torch.optim.Optimizer:
        parameters = [nn.Parameter(torch.ones(shape)) for shape in shapes]
        optimizer = build_optimizer(parameters, OptimConfig())
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        return optimizer

    optimizer = adamw((2, 3), (3,))
    before = state_of(optimizer)
    tensors, description = flatten_optimizer(adamw((2, 3), (3,), (4,)))
    with pytest.raises(CheckpointError, match=r"has 3 parameters \(by group \[1, 2\]\), this one 2 \(\[1, 1\]\)"):
        restore_optimizer(optimizer, tensors, description)
    tensors, description = flatten_optimizer(adamw((3, 2), (3,)))
    with pytest.raises(CheckpointError, match=r"parameter 0 has shape \[2, 3\], .* \[3, 2\]; resume with"):
        restore_optimizer(optimizer, tensors, description)
    tensors, description = flatten_optimizer(adamw((2, 3), (3,)))
    with pytest.raises(CheckpointError, match=r"differ by 1 names, the first is '1\.exp_avg'"):
        restore_optimizer(optimizer, {k: v for k, v in tensors.items() if k != "1.exp_avg"}, description)
    one, other = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(3))
    sgd = torch.optim.SGD([{"params": [one]}, {"params": [other]}], lr=0.1)
    with pytest.raises(CheckpointError, match="settings that AdamW does not: dampening, momentum, nesterov"):
        restore_optimizer(optimizer, *flatten_optimizer(sgd))
    assert_same(state_of(optimizer), before)


def test_r24_a_training_goes_on_without_the_parameters_that_never_had_a_gradient():
    """Version 0.1.0 kept them in modules and optimisers; they are frozen now."""
    torch.manual_seed(0)
    old = nn.ModuleDict({"idle": nn.Linear(3, 3), "used": nn.Linear(2, 2), "last": nn.Linear(2, 1)})
    new = copy.deepcopy(old)
    new["idle"].requires_grad_(False)

    def step(module: nn.ModuleDict, optimizer: torch.optim.Optimizer) -> None:
        module["last"](module["used"](torch.ones(4, 2))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    before, after = (build_optimizer(module.parameters(), OptimConfig(weight_decay=0.1)) for module in (old, new))
    step(old, before)
    tensors, state = training_state({"m": old}, {"m": Average(old, exponential(0.9))}, {"m": before})
    average = Average(new, exponential(0.9))
    restore_training(Checkpoint(1, copy.deepcopy(tensors), state), {"m": new}, {"m": average}, {"m": after})
    step(old, before)
    step(new, after)
    assert_same(dict(new.state_dict()), dict(old.state_dict()))
    idle = nn.ModuleDict({"used": nn.Linear(2, 2), "last": nn.Linear(2, 1)})  # another model, not a frozen part
    with pytest.raises(CheckpointError, match=r"only the checkpoint has idle\.bias \(2 names differ\)"):
        load_trained(idle, idle, tensors["m-weights"])


def test_an_optimiser_whose_state_is_no_tensors_is_refused():
    module = nn.Linear(2, 2)
    optimizer = torch.optim.LBFGS(module.parameters())

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = module(torch.ones(1, 2)).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with pytest.raises(CheckpointError, match=r"optimiser state '.*' is a list; only tensors, numbers"):
        flatten_optimizer(optimizer)
