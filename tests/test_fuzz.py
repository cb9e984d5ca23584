"""Wrong configs, wrong arguments and odd captions at random, the same ones in every run; see `tests.fuzzing`."""

import pytest
from hypothesis import HealthCheck, given, settings

from ldm.commands import cli
from ldm.commands import sample as sample_module

from .fuzzing import AREAS, Bench, area

EXAMPLES = {  # few, in every run of the suite; `python -m benchmarks.fuzz` draws thousands
    "config files": 60,
    "configs": 160,
    "trainings": 100,
    "pipeline arguments": 100,
    "captions": 40,
    "ldm sample": 40,
    "metadata": 40,
    "tables": 40,
    "image files": 60,
    "command lines": 40,
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("bench"))


def test_every_area_is_fuzzed():
    assert EXAMPLES.keys() == AREAS.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", AREAS)
def test_nothing_that_was_drawn_breaks_the_contract(name, bench):
    strategy, check = area(name, bench)

    @settings(
        max_examples=EXAMPLES[name],
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def drawn(case):
        check(case)
        seen.append(case)

    seen = []
    drawn()
    assert len(seen) >= min(EXAMPLES[name], 10)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a cat \udc83"], "prompts: got 'a cat \\udc83', which is not valid Unicode"),
        (["a cat", f"--seed={10**30}"], "seed: got 0xc9f2c9cd0467"),
        (["a cat", "--num_inference_steps=0"], "num_inference_steps: got 0; expected a whole number from 1 to 1000"),
        (["a cat", "--guidance_scale=-1"], "guidance_scale: got -1.0; expected"),
    ],
)
def test_ldm_sample_refuses_with_a_line_and_no_traceback(words, message, bench, monkeypatch):
    monkeypatch.setattr(sample_module, "load_pipeline", lambda *_: bench.pipeline)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["sample", "--model", "model", "--out", str(bench.folder), *words])
    assert str(stopped.value.code).startswith(message)
