"""The doctor: a healthy config passes, and each fault is found by the check that is for it and by no other."""

import json
import math
import sys
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn
from torch.profiler import ProfilerActivity, profile

import train_text2img
import train_vae
from ldm.config import DoctorConfig, LoopConfig, ObjectiveConfig, OptimConfig, SamplerConfig, StageConfig
from ldm.config.file import load_config
from ldm.data.batches import Batch
from ldm.doctor import cost as cost_module
from ldm.doctor import examination
from ldm.doctor import overfit as overfit_module
from ldm.doctor.agreement import agreement, gaussian_std
from ldm.doctor.cost import GIB, Cost, Memory, Stopwatch, kept_for_backward, kept_memory
from ldm.doctor.examination import examined, overfit_finding
from ldm.doctor.forecast import OPERATION_SECONDS, UTILISATION, forecast
from ldm.doctor.latents import round_trip
from ldm.doctor.overfit import Overfit, fixed_draws, restored
from ldm.doctor.plan import Plan
from ldm.evaluation.conditions import CONDITIONS
from ldm.evaluation.samples import ImageSamples
from ldm.export import kinds as export_module
from ldm.models.scheduler import build_scheduler
from ldm.objectives.denoising import Objective
from ldm.training.alarms import SCALE
from ldm.training.averages import Average, exponential, power_function
from ldm.training.loop import Loop
from ldm.training.run import Run, opened
from ldm.training.validation import Validation
from pipelines.pixels import PixelPipeline
from pipelines.text2img import TextToImagePipeline

from .table import table
from .test_objective import SOUND
from .test_pixels_pipeline import network

ROOT = Path(__file__).parent.parent
VAE = ROOT / "assets" / "openmoji-vae"
STAGE = (
    *("--config", "configs/tiny/text2img.yaml", "--doctor", "--data.image_size", "64", "--space.autoencoder", VAE),
    *("--denoiser.sample_size", "8", "--denoiser.in_channels", "16", "--denoiser.out_channels", "16"),
    *("--validation.num_inference_steps", "20", "--validation.num_images", "2", "--validation.loss_images", "4"),
    *("--loop.mixed_precision", "no", "--conditioners.text.max_length", "16", "--data.cache", "false"),
)
AUTOENCODER = ("--config", "configs/tiny/vae.yaml", "--doctor", "--loop.mixed_precision", "no")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(overfit_module, "MAX_STEPS", 6)  # fewer than are enough: they only have to help
    monkeypatch.setattr(cost_module, "MEASURED_SECONDS", 0.1)
    monkeypatch.setattr(examination, "SCALE_IMAGES", 48)
    monkeypatch.setattr(examination, "ROUND_TRIP_IMAGES", 8)


def examine(monkeypatch, main, folder, *words):
    """Return the report, and what the process would exit with."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["train", *map(str, words), "--output_dir", str(folder)])
    code = 0
    try:
        main()
    except SystemExit as left:
        code = left.code
    torch.set_num_threads(1)
    return json.loads((folder / "doctor" / "report.json").read_text()), code


def wrong(report):
    return [finding["name"] for finding in report["findings"] if not finding["ok"]]


def text(report, name):
    return next(finding["text"] for finding in report["findings"] if finding["name"] == name)


# ---- the whole examination ----


def test_a_healthy_stage_passes_and_leaves_a_report_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(overfit_module, "MAX_STEPS", 100)
    more = ["--doctor.gpu_tflops", "100", "--doctor.gpu_memory_gib", "8", "--doctor.price_per_hour", "2"]
    report, code = examine(monkeypatch, train_text2img.main, tmp_path, *STAGE, *more)
    assert (wrong(report), report["ok"], code) == ([], True, 0)
    assert [finding["name"] for finding in report["findings"]] == [
        "latent scale", "autoencoder", "objective and scheduler", "conditions", "overfits one batch",
        "saved and reloaded", "plan", "cost", "another machine",
    ]  # fmt: skip
    assert "exactly the sample" in text(report, "saved and reloaded")
    assert "StableDiffusionPipeline" in text(report, "saved and reloaded")
    assert "60 training images, 8 a step: 7.5 steps an epoch; 40 steps = 5.3 epochs" in text(report, "plan")
    assert [path.name for path in tmp_path.iterdir()] == ["doctor"]
    left = {path.name for path in (tmp_path / "doctor").iterdir()} - {".lock"}
    assert left == {"report.txt", "report.json", "overfit.png", "round_trip.png"}
    printed = capsys.readouterr().out
    assert (tmp_path / "doctor" / "report.txt").read_text() == printed
    assert printed.endswith("nothing is wrong\n")


def scaled(tmp_path, factor):
    vae = AutoencoderKL.from_pretrained(VAE)
    vae.register_to_config(scaling_factor=factor)
    vae.save_pretrained(tmp_path / "vae")
    (tmp_path / "vae" / "training.json").write_bytes((VAE / "training.json").read_bytes())
    return tmp_path / "vae"


@pytest.mark.slow
def test_unscaled_latents_are_found_by_their_scale_alone(tmp_path, monkeypatch):
    vae = scaled(tmp_path, 0.18215)
    report, code = examine(monkeypatch, train_text2img.main, tmp_path, *STAGE, "--space.autoencoder", vae)
    assert (wrong(report), code) == (["latent scale"], 1)
    remedy = float(text(report, "latent scale").rpartition("by ")[2].split()[0])
    assert remedy * 0.18215 == pytest.approx(1, abs=0.3)


def test_an_autoencoder_that_loses_too_much_is_found_by_the_round_trip_alone(tmp_path, monkeypatch):
    """Trained at 64 pixels, it gives 17 dB at 32."""
    small = ["--data.image_size", "32", "--denoiser.sample_size", "4"]
    report, code = examine(monkeypatch, train_text2img.main, tmp_path, *STAGE, *small)
    assert (wrong(report), code) == (["autoencoder"], 1)


@pytest.mark.slow
@table("rate", ["1e-9", "1e4"])
def test_a_learning_rate_that_teaches_nothing_is_found_by_the_overfit_alone(rate, tmp_path, monkeypatch):
    report, code = examine(monkeypatch, train_text2img.main, tmp_path, *STAGE, "--optim.learning_rate", rate)
    assert (wrong(report), code) == (["overfits one batch"], 1)
    assert ("try a higher" if rate == "1e-9" else "try a lower") in text(report, "overfits one batch")


@pytest.mark.slow
def test_another_scheduler_is_found_by_the_agreement_alone(tmp_path, monkeypatch):
    def other(config, sampler, clip_sample):
        return build_scheduler(ObjectiveConfig("flow", "sample"))

    monkeypatch.setattr(export_module, "build_scheduler", other)
    report, code = examine(monkeypatch, train_text2img.main, tmp_path, *STAGE)
    assert (wrong(report), code) == (["objective and scheduler"], 1)


@pytest.mark.slow
def test_captions_cut_to_their_first_word_are_found_by_the_conditions_alone(tmp_path, monkeypatch):
    report, code = examine(monkeypatch, train_text2img.main, tmp_path, *STAGE, "--conditioners.text.max_length", "4")
    assert (wrong(report), code) == (["conditions"], 1)


@pytest.mark.slow
def test_a_pipeline_that_saves_other_weights_is_found_by_its_sample_alone(tmp_path, monkeypatch):
    save = TextToImagePipeline.save_pretrained

    def other(self, folder, **more):
        bias = self.vae.decoder.conv_out.bias
        kept = bias.detach().clone()
        bias.data += 0.05
        save(self, folder, **more)
        bias.data.copy_(kept)

    monkeypatch.setattr(TextToImagePipeline, "save_pretrained", other)
    report, code = examine(monkeypatch, train_text2img.main, tmp_path, *STAGE)
    assert (wrong(report), code) == (["saved and reloaded"], 1)


@pytest.mark.slow
def test_a_pipeline_that_cannot_be_loaded_is_found_by_its_sample_alone(tmp_path, monkeypatch):
    save = TextToImagePipeline.save_pretrained

    def other(self, folder, **more):
        save(self, folder, **more)
        (Path(folder) / "unet" / "config.json").write_text("no JSON")

    monkeypatch.setattr(TextToImagePipeline, "save_pretrained", other)
    report, code = examine(monkeypatch, train_text2img.main, tmp_path, *STAGE)
    assert (wrong(report), code) == (["saved and reloaded"], 1)
    assert "cannot load what was saved" in text(report, "saved and reloaded")


@pytest.mark.slow
def test_a_gpu_that_is_too_small_is_found_by_its_memory_alone(tmp_path, monkeypatch):
    report, code = examine(monkeypatch, train_text2img.main, tmp_path, *STAGE, "--doctor.gpu_memory_gib", "0.001")
    assert (wrong(report), code) == (["another machine"], 1)
    assert "does not fit into its 0.001 GiB; use more loop.gradient_acc" in text(report, "another machine")


@table(("sampler", "loaded"), [("ddpm", "DDPMPipeline"), ("ddim", "PixelPipeline")])
def test_pixels_are_reloaded_by_diffusers_own_class_where_it_makes_the_same_images(
    sampler, loaded, tmp_path, monkeypatch
):
    config = load_config(StageConfig, ["--config", str(ROOT / "configs/tiny/ddpm.yaml"), "--sampler.kind", sampler])
    scheduler = build_scheduler(config.objective, config.sampler, clip_sample=True)
    asked = {"condition": CONDITIONS["batch_size"], "conditions": [CONDITIONS["batch_size"]]}
    step = SimpleNamespace(**asked, given_sizes={"batch_size": None})
    validation = Validation.__new__(Validation)
    validation.config, validation.images, validation.seed = config.validation, None, config.seed
    validation.pipeline, validation.step = PixelPipeline(network(), scheduler), step
    validation.samples = ImageSamples(None, None, 8)
    monkeypatch.setattr(examination, "fixed_batch", lambda train, count: SimpleNamespace(rows=[0]))
    kind = next(kind for kind in export_module.KINDS if kind.asks == "batch_size")
    found = examination.same_sample(config, kind, validation, None, tmp_path)
    assert found.ok
    assert f"{loaded}.from_pretrained makes exactly the sample" in found.text


@pytest.mark.slow
def test_an_autoencoder_passes_and_a_dead_one_does_not(tmp_path, monkeypatch):
    monkeypatch.setattr(overfit_module, "MAX_STEPS", 100)
    report, code = examine(monkeypatch, train_vae.main, tmp_path / "a", *AUTOENCODER)
    assert (wrong(report), code) == ([], 0)
    assert [finding["name"] for finding in report["findings"]] == ["overfits one batch", "plan", "cost"]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["doctor"]
    report, code = examine(monkeypatch, train_vae.main, tmp_path / "b", *AUTOENCODER, "--optim.learning_rate", "1e-9")
    assert (wrong(report), code) == (["overfits one batch"], 1)


def test_what_the_alarms_say_before_a_training_is_wrong_for_the_doctor_too(monkeypatch):
    faults = [(SCALE, "has a finding of its own"), ("guidance", "dropout is 0")]
    monkeypatch.setattr(examination, "faults_before", lambda *given: faults)
    validation = SimpleNamespace(truncation=SimpleNamespace(captions=0.25, tokens=0.125))
    found = examination.conditions(None, validation, None)
    assert not found.ok
    assert found.text == (
        "25.0% of the training captions and 12.5% of their tokens are cut off; guidance: dropout is 0"
    )
    monkeypatch.setattr(examination, "faults_before", lambda *given: faults[:1])
    assert examination.conditions(None, validation, None).ok


def test_it_runs_in_one_process_and_empties_its_own_folder_only(tmp_path, monkeypatch):
    (tmp_path / "doctor").mkdir()
    for name in ("kept", "doctor/gone"):
        (tmp_path / name).write_text("")
    config = SimpleNamespace(output_dir=str(tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="runs in one process"):
        examined(config)
    assert (tmp_path / "doctor" / "gone").exists()


# ---- the plan: by hand ----


def plan(steps=800, batch_size=128, images=3553, optim=None, **loop):
    return Plan(images, batch_size, steps, LoopConfig(**{"max_train_seconds": 600.0} | loop), optim or OptimConfig())


def test_the_plan_in_words():
    """3553 / 128 = 27.76 steps an epoch; 800 / 27.76 = 28.8 epochs; validations after 300, 600 and 800 steps.

    The last decay of the averages is 800 / 809, and 0.5 that to the power of 62.
    """
    optim = OptimConfig(warmup_steps=100, ema_decay=0.99)
    assert plan(optim=optim, validate_every_steps=300, save_every_steps=800).text() == (
        "3,553 training images, 128 a step: 27.8 steps an epoch; 600 s are about 800 steps = 28.8 epochs: each "
        "image is seen 29 times; validation every 300 steps (3 in all), checkpoints every 800 (1 in all); warm-up "
        "is 12.5% of the steps, the half-life of the averages 62 steps"
    )


@table(
    ("changes", "words"),
    [
        ({"steps": 20}, "less than one epoch: 28% of the images are never seen"),  # 20 * 128 / 3553 = 0.72
        ({"batch_size": 8000}, "data.batch_size 8,000 is larger than the data: each step sees an image 2.3 times"),
        ({"save_every_steps": 801}, "loop.save_every_steps 801 is longer than the run of 800 steps: a kill would lose"),
        ({"validate_every_steps": 801}, "loop.validate_every_steps 801 is longer than the run of 800 steps"),
        ({"optim": OptimConfig(warmup_steps=400)}, "optim.warmup_steps: 50% of the run is warm-up"),
        ({"optim": OptimConfig(decay="cosine")}, "optim.decay_fraction 1: the number of steps is fixed when the decay"),
    ],
)
def test_odd_plans_are_warned_of(changes, words):
    quiet = {"save_every_steps": 10, "validate_every_steps": 10}
    (warning,) = plan(**quiet | changes).oddities()
    assert warning.startswith(words)
    assert list(plan(**quiet | changes).faults()) == []
    assert list(plan(**quiet).oddities()) == []


def test_a_warm_up_as_long_as_the_run_is_a_fault():
    (fault,) = plan(optim=OptimConfig(warmup_steps=800)).faults()
    assert fault.startswith("optim.warmup_steps 800 is no shorter than the run of 800 steps")
    assert list(plan(optim=OptimConfig(warmup_steps=799)).faults()) == []


@table(("decay", "steps"), [(0.9999, 1000), (0.9, 1000), (0.999, 30)])
def test_the_half_life_is_that_of_the_averages(decay, steps):
    """Average a weight that is 0 but in the last `n` steps, 1 there: about half of it has arrived after a half-life."""
    half = round(plan(steps, optim=OptimConfig(ema_decay=decay)).average_half_life)
    module = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(module.weight)
    average = Average(module, exponential(decay))
    for step in range(steps):
        nn.init.constant_(module.weight, float(step >= steps - half))
        average.update(step)
    assert float(average.module.weight) == pytest.approx(0.5, abs=0.06)  # the half-life is a whole number of steps


# ---- the cost: closed forms ----

MEMORY = Memory(4 * GIB, gradients=3 * GIB, averages=2 * GIB, optimizer=6 * GIB, activations=1 * GIB, update=1)
COST = Cost(2.0, 0.5, 30.0, 10.0, step_flops=4 * 10**12, step_operations=5000, memory=MEMORY, peak_bytes=None)


def test_seconds_of_a_run_are_steps_validations_and_checkpoints():
    """800 (2 + 0.5) + 3 * 30 + 8 * 10 s."""
    run = plan(validate_every_steps=300, save_every_steps=100)
    assert COST.seconds(run) == 2170
    assert COST.text(run, 2.5).startswith(
        "2 s a step and 0.5 s for its batch, 30 s a validation, 10 s a checkpoint: 36.2 minutes in all, which costs "
        "1.51; 16.00 GiB of memory (weights 4.00, gradients 3.00, averages 2.00, optimizer 6.00, activations 1.00); "
    )


def test_a_limit_of_seconds_becomes_the_steps_that_the_loop_makes_of_it():
    assert COST.steps(600.0) == 300
    assert COST.steps(1.0) == 2  # the loop sees after the first that the time is over, and takes one more


def test_another_machine_is_reckoned_from_flops_and_memory():
    """4 TFLOP at 100 * 0.2 TFLOP/s are 0.2 s; 800 of them 160 s."""
    found = forecast(COST, plan(), DoctorConfig(price_per_hour=9.0, gpu_tflops=100.0, gpu_memory_gib=15.9))
    assert UTILISATION == 0.2
    assert found.step_seconds == pytest.approx(0.2)
    assert found.hours == pytest.approx(160 / 3600)
    assert found.fits is False
    assert "which cost 0.40; 16.00 GiB does not fit into its 15.9 GiB" in found.text
    assert "used at 20%" in found.text
    small = forecast(replace(COST, step_flops=10**12), plan(), DoctorConfig(gpu_tflops=100.0))
    assert small.step_seconds == 5000 * OPERATION_SECONDS
    assert "busy with launches" in small.text
    there = forecast(replace(COST, peak_bytes=8 * GIB), plan(), DoctorConfig(gpu_memory_gib=8.0))
    assert (there.step_seconds, there.hours, there.fits) == (None, None, True)  # what was measured, not what was added


def test_memory_that_this_machine_lacks_is_a_fault(monkeypatch):
    monkeypatch.setattr(cost_module, "memory_bytes", lambda: 16 * GIB)
    assert COST.memory_fault() is None
    monkeypatch.setattr(cost_module, "memory_bytes", lambda: 16 * GIB - 1)
    assert COST.memory_fault().startswith("this machine has 16.00 GiB of memory")
    assert replace(COST, peak_bytes=1).memory_fault() is None


class Layers:
    """A step of two linear layers, 8 -> 16 -> 4."""

    frozen_networks = ()

    def __init__(self, net=None):
        self.net = net or nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
        self.modules, self.frozen_networks = {"net": self.net}, ()
        self.x = torch.randn(10, 8)

    def losses(self, batch, global_step):
        return {"net": self.net(self.x).square().mean(), "other": torch.zeros(())}


def test_flops_and_activations_of_a_known_network():
    """A multiplication and an addition for each weight and sample: forward; and backward for its gradient and for the
    gradient of its input, which the first layer needs not. Kept: the input, tanh's output (twice the same), the output.
    """
    step = Layers()
    run = SimpleNamespace(attention=torch.enable_grad)
    flops, operations, kept = cost_module._one_pass(step, Batch([], [], []), run)
    assert 20 < operations < 60  # forward t, addmm, tanh, t, addmm, pow, mean, zeros; backward about two for each
    assert flops == 2 * 10 * (2 * 8 * 16 + 3 * 16 * 4)
    assert kept == 4 * 10 * (8 + 16 + 4)
    assert all(parameter.grad is None for parameter in step.net.parameters())


@table("optimizer", ["adamw", "muon"])
def test_the_memory_is_what_a_logged_step_holds_at_its_peak(optimizer, tmp_path):
    """As torch's profiler counts what is allocated; two modules, a text encoder's frozen half and a small batch."""
    with opened(Run(str(tmp_path), 0, LoopConfig(9, log_every_steps=1, trackers=(), mixed_precision="no"))) as run:
        frozen = nn.Linear(64, 256).requires_grad_(False)
        step = Layers(nn.Sequential(nn.Linear(8, 64), frozen, nn.Linear(256, 128), nn.Linear(128, 256)))
        step.modules["other"] = other = nn.Linear(8, 512)
        step.losses = lambda batch, global_step: {
            name: module(step.x).square().mean() for name, module in step.modules.items()
        }
        step.averages = {"net": Average(step.net, exponential(0.9)), "other": Average(other, exponential(0.9))}
        step.forwards, step.memory, step.after_step = step.modules, {}, lambda: None
        loop = Loop(step, OptimConfig(optimizer=optimizer), run.config, run, 1.0)
        loop._take_step([[0]])
        optimizers = {name: one.optimizer for name, one in loop.optimizers.items()}
        memory = kept_memory(step, optimizers, activations=0)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            loop._take_step([[0]])
        events = profiler.profiler.kineto_results.events()
        peak = max(accumulate(event.nbytes() for event in events if event.name() == "[memory]"))
    kept = memory.weights + memory.averages + memory.optimizer
    assert memory.total == pytest.approx(kept + peak, rel=0.03)  # a few activations are left


def test_weights_are_not_counted_as_kept():
    weight = torch.randn(4, 4, requires_grad=True)
    x = torch.randn(2, 4, requires_grad=True)
    with kept_for_backward([weight]) as kept:
        x @ weight
    assert sum(kept.values()) == x.nbytes
    with kept_for_backward([]) as kept:
        x @ weight
    assert sum(kept.values()) == x.nbytes + weight.nbytes


def test_the_stopwatch_tells_steps_from_loading(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(cost_module.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(cost_module, "MEASURED_SECONDS", 8.0)

    def batches(start_step, **shares):
        while True:
            now[0] += 0.25
            yield ["batch"]

    watch = Stopwatch()
    for _ in watch.timed(batches, 0):
        now[0] += 3.0
    assert watch.step_seconds == [3.0] * 5  # two to warm up, three measured: 9 s are enough
    assert watch.loading_seconds == [0.25] * 5


# ---- the objective and the scheduler ----


@table(("path", "prediction_type", "rescaled"), SOUND)
@table("steps", [20, 50])
def test_our_scheduler_agrees_with_every_objective(path, prediction_type, rescaled, steps):
    config = ObjectiveConfig(path, prediction_type, zero_terminal_snr=rescaled)
    finding = agreement(Objective(config), build_scheduler(config), steps)
    assert (finding.ok, finding.warnings) == (True, ()), finding.text


@pytest.mark.slow
@table("sampler", [("ddim", "fixed_small"), ("ddpm", "fixed_small"), ("ddpm", "fixed_large")])
@table("path", ["linear", "scaled_linear", "cosine"])
def test_the_other_samplers_agree_too(path, sampler):
    config = ObjectiveConfig(path, "epsilon")
    scheduler = build_scheduler(config, SamplerConfig(*sampler), clip_sample=True)
    finding = agreement(Objective(config), scheduler, 50)
    assert finding.ok, finding.text
    assert gaussian_std(Objective(config), scheduler, 1000) == pytest.approx(1, abs=0.015)
    assert scheduler.config.clip_sample, "the one that is asked about stays as it is"


@table("sampler", ["ddim", "ddpm"])
def test_another_sampler_of_another_objective_is_wrong(sampler):
    scheduler = build_scheduler(ObjectiveConfig("scaled_linear", "epsilon"), SamplerConfig(sampler))
    finding = agreement(Objective(ObjectiveConfig("linear", "epsilon")), scheduler, 50)
    assert not finding.ok
    assert "the levels may differ by" in finding.text


@table("path", ["scaled_linear", "flow"])
def test_few_steps_are_a_warning_and_no_disagreement(path):
    config = ObjectiveConfig(path, "sample")
    finding = agreement(Objective(config), build_scheduler(config), 4)
    assert finding.ok
    assert finding.warnings[0].startswith("validation.num_inference_steps 4: too few")


@table(
    ("trained", "sampled", "words"),
    [
        (("linear", "epsilon"), ("linear", "v_prediction"), "reads the model output as v_prediction"),
        (("flow", "flow_prediction"), ("flow", "sample"), "reads the model output as sample"),
        (("linear", "epsilon"), ("scaled_linear", "epsilon"), "the levels may differ by"),
        (("cosine", "sample"), ("flow", "sample"), "the levels may differ by"),
        (("linear", "sample", 1000, True), ("linear", "sample", 1000, False), "the levels may differ by"),
    ],
)
def test_a_scheduler_of_another_objective_is_wrong(trained, sampled, words):
    finding = agreement(Objective(ObjectiveConfig(*trained)), build_scheduler(ObjectiveConfig(*sampled)), 20)
    assert not finding.ok
    assert words in finding.text


def test_a_shifted_flow_keeps_its_levels():
    """Other timesteps, each with its own level: what a shift is."""
    config = ObjectiveConfig("flow", "flow_prediction")
    shifted = type(scheduler := build_scheduler(config)).from_config(scheduler.config, flow_shift=3.0)
    assert agreement(Objective(config), shifted, 50).ok


def test_a_solver_that_does_nothing_keeps_the_std_of_noise():
    config = ObjectiveConfig("linear", "epsilon")
    scheduler = build_scheduler(config)
    scheduler.step = lambda output, timestep, x_t, return_dict: (x_t,)
    assert gaussian_std(Objective(config), scheduler, 20) == pytest.approx(2, rel=1e-4)  # of data of std 1/2


# ---- what is learned, and what comes back ----


@table(
    ("start", "end", "steps", "pretrained", "ok"),
    [
        (2.0, 1.19, 300, False, True),
        (2.0, 1.21, 300, False, False),
        (2.0, 1.21, 10, False, True),  # a slow machine: it has fallen
        (2.0, 1.995, 10, False, False),
        (2.0, 1.8, 300, True, True),
        (2.0, math.nan, 300, False, False),
        (2.0, math.inf, 10, True, False),
    ],
)
def test_how_far_is_far_enough(start, end, steps, pretrained, ok):
    config = SimpleNamespace(optim=OptimConfig())
    assert overfit_finding(config, Overfit(start, end, steps, 1.0), "loss", pretrained).ok is ok


def test_draws_are_fixed_and_have_other_positions():
    batches = fixed_draws(Batch([7, 9], [1, 2], ["a", "b"]))
    positions = [position for batch in batches for position in batch.positions]
    assert len(set(positions)) == len(positions) == 2 * overfit_module.NOISE_DRAWS
    assert all(batch.rows == [1, 2] for batch in batches)


def test_weights_and_averages_are_put_back():
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    averages = {"main": Average(module, 0.5), "main-0.1": Average(module, power_function(0.1))}
    memory = {"seen": torch.ones(3)}
    step = SimpleNamespace(modules={"main": module}, averages=averages, memory=memory)
    states = [memory, module.state_dict(), *(average.module.state_dict() for average in averages.values())]
    before = [{name: value.clone() for name, value in state.items()} for state in states]
    with restored(step):
        for state in states:
            for value in state.values():
                value.fill_(7)
    for kept, now in zip(before, states, strict=True):
        assert all(torch.equal(kept[name], now[name]) for name in kept)


@table(("noise", "ok"), [(0.05, True), (0.3, False)])
def test_a_round_trip_is_judged_by_its_error(noise, ok, tmp_path):
    """Noise of std 0.05 in a range of 2 is 32 dB, of 0.3 16.5 dB."""
    side = torch.linspace(-0.9, 0.9, 32)
    images = (side[:, None] * side).sign().mul(0.5).expand(4, 3, 32, 32).contiguous()

    class Noisy:
        def moments(self, pixel_values):
            return SimpleNamespace(mean=pixel_values)

        def decode(self, x0):
            return x0 + noise * torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))

    finding = round_trip(Noisy(), images, tmp_path)
    assert finding.ok is ok
    assert (
        f"PSNR {-20 * math.log10(noise / 2):.0f}" in finding.text.replace(".0 dB", " dB").replace("25.9", "26")
        or not ok
    )
    assert (tmp_path / "round_trip.png").exists()
