"""Averages against closed forms: an off-by-one in the step or in the decay fails here."""

import math

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ldm.training.averages import Average, exponential, gamma_of, power_function


def scalar(value: float) -> nn.Module:
    module = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.constant_(module.weight, value)
    return module


def test_warm_up_on_a_constant_is_a_ratio_of_factorials():
    module = scalar(1.0)
    average = Average(module, exponential(0.9999))
    nn.init.constant_(module.weight, 3.0)
    for k in range(1, 30):
        average.update(k - 1)
        # the product of (1 + i) / (10 + i) for i < k: what is left of the start
        left = math.factorial(k) * math.factorial(9) / math.factorial(k + 9)
        assert average.module.weight.item() == pytest.approx(3.0 - 2.0 * left, rel=1e-12)


def test_r06_the_first_step_keeps_a_tenth():
    module = scalar(1.0)
    average = Average(module, exponential(0.9999))
    nn.init.zeros_(module.weight)
    average.update(0)
    assert average.module.weight.item() == pytest.approx(0.1, rel=1e-12)


def test_a_ramp_lags_by_a_geometric_series():
    decay = 0.5
    module = scalar(0.0)
    average = Average(module, exponential(decay))
    for k in range(1, 40):
        nn.init.constant_(module.weight, k)
        average.update(100 + k)  # (1 + step) / (10 + step) is above 0.5 from step 8 on
        lag = decay * (1 - decay**k) / (1 - decay)
        assert average.module.weight.item() == pytest.approx(k - lag, rel=1e-12)


def test_the_decay_is_capped_at_its_setting_and_not_before():
    for step, decay in ((7, 8 / 17), (8, 0.5), (9, 0.5), (10**6, 0.5)):
        module = scalar(1.0)
        average = Average(module, exponential(0.5))
        nn.init.zeros_(module.weight)
        average.update(step)
        assert average.module.weight.item() == pytest.approx(decay, rel=1e-12)


def test_it_equals_torchs_own_average():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    average = Average(module, exponential(0.9))
    reference = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    reference.n_averaged.fill_(1)  # its first update copies
    for step in range(100, 105):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter))
        average.update(step)
        reference.update_parameters(module)
    for ours, theirs in zip(average.module.parameters(), reference.module.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_decay_zero_is_the_trained_module():
    module = nn.Linear(3, 4)
    average = Average(module, exponential(0.0))
    nn.init.normal_(module.weight)
    average.update(5)
    assert torch.equal(average.module.weight, module.weight)


def test_r06_the_trained_module_is_never_touched():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 3), nn.Dropout(), nn.BatchNorm1d(3)).train()
    average = Average(module, exponential(0.9))
    assert not any(part.training for part in average.module.modules())
    assert not any(parameter.requires_grad for parameter in average.module.parameters())
    assert all(part.training for part in module.modules())
    assert all(parameter.requires_grad for parameter in module.parameters())
    module(torch.randn(8, 3)).square().sum().backward()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    average.update(0)
    average.module(torch.randn(8, 3))
    average.module.half()
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert tensor.dtype == before[name].dtype


def test_buffers_are_copied_not_averaged():
    module = nn.BatchNorm1d(3)
    average = Average(module, exponential(0.9))
    module(torch.randn(8, 3))
    average.update(50)
    for name, buffer in module.named_buffers():  # num_batches_tracked is an integer
        assert torch.equal(average.module.get_buffer(name), buffer)
        assert average.module.get_buffer(name).data_ptr() != buffer.data_ptr()


def test_frozen_parameters_cost_no_memory_and_cannot_be_converted_by_accident():
    module = nn.Sequential(nn.Linear(2, 2).half().requires_grad_(False), nn.Linear(2, 2))
    average = Average(module, exponential(0.9))
    assert average.module[0].weight.data_ptr() == module[0].weight.data_ptr()
    assert average.module[1].weight.data_ptr() != module[1].weight.data_ptr()
    average.update(0)
    average.module.double()
    assert module[0].weight.dtype == torch.float16
    assert Average(module[0], exponential(0.9)).update(0) is None  # nothing trained is nothing to do


def test_tied_weights_stay_tied_and_are_averaged_once():
    module = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    module[1].weight = module[0].weight
    nn.init.ones_(module[0].weight)
    average = Average(module, exponential(0.9))
    nn.init.zeros_(module[0].weight)
    average.update(0)
    assert average.module[0].weight is average.module[1].weight
    assert torch.allclose(average.module[0].weight, torch.tensor(0.1))


def test_r06_the_module_is_the_whole_state():
    torch.manual_seed(0)
    module = nn.Linear(3, 4)
    average, resumed = Average(module, exponential(0.99)), Average(module, exponential(0.99))
    for step in range(6):
        if step == 3:
            resumed.module.load_state_dict(average.module.state_dict())
        nn.init.normal_(module.weight)
        average.update(step)
        if step >= 3:
            resumed.update(step)
    assert torch.equal(average.module.weight, resumed.module.weight)


def test_what_would_not_average_is_refused():
    for decay in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"optim\.ema_decay: got .*; expected 0"):
            exponential(decay)
    with pytest.raises(ValueError, match=r"weight is torch\.bfloat16, in which an average does not move"):
        Average(nn.Linear(2, 2, dtype=torch.bfloat16), exponential(0.999))


def test_gamma_is_the_root_of_its_definition_and_sigma_rel_the_spread_of_the_profile():
    tau = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    for sigma_rel in (0.001, 0.02, 0.05, 0.1, 0.25, 0.28):
        gamma = gamma_of(sigma_rel)
        assert ((gamma + 1) / (gamma + 3)) ** 0.5 / (gamma + 2) == pytest.approx(sigma_rel, rel=1e-9)
        profile = (gamma + 1) * tau**gamma
        mean = float((profile * tau).mean())
        assert float((profile * (tau - mean) ** 2).mean()) ** 0.5 == pytest.approx(sigma_rel, rel=1e-3)
    assert gamma_of(0.05) == pytest.approx(16.97, abs=5e-3)  # the paper's values
    assert gamma_of(0.1) == pytest.approx(6.94, abs=5e-3)
    for sigma_rel in (0.0, -0.1, 0.29, math.nan):
        with pytest.raises(ValueError, match=r"sigma_rel: got .*; expected a number above 0, to 0\.28"):
            gamma_of(sigma_rel)


def test_a_power_function_average_weighs_each_step_by_the_integral_of_the_profile():
    module = scalar(100.0)
    average = Average(module, power_function(0.1))
    power = gamma_of(0.1) + 1
    draws = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for t in range(1, 51):
        nn.init.constant_(module.weight, float(draws[t - 1]))
        average.update(t - 1)
        steps = torch.arange(1, t + 1, dtype=torch.float64)
        shares = (steps**power - (steps - 1) ** power) / t**power
        assert average.module.weight.item() == pytest.approx(float(shares @ draws[:t]), rel=1e-9)  # none of 100
