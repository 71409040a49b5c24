# The commands of this repository; `make` alone lists them.
.DEFAULT_GOAL := help
.PHONY: help setup lab fast test check export book pdf bench records clean
export PATH := $(CURDIR)/.venv/bin:$(PATH):$(HOME)/.cargo/bin
# Two cores are shared by many small matrices here: one thread each is the fastest.
export OMP_NUM_THREADS ?= 1
export TORCHDYNAMO_DISABLE ?= 1
BUILD := book/_build
SPHINX := python -m sphinx -q -T -W --keep-going -c book
CARGO := cargo
CRATE := --manifest-path rustbpe/Cargo.toml
PYTHON_FILES := nbs scripts tests dev book nanochat/_nbdev.py

help: ## list these targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: ## make .venv with everything in it; the second time it does nothing
	@bash dev/setup.sh dev

lab: setup ## read the book and run its cells in JupyterLab
	jupyter lab nbs/01_introduction.ipynb

# Two tests at a time; those of one file stay together, since they share what it builds.
PYTEST := python -m pytest -n 2 --dist loadfile

fast: setup ## the quick tests, about a minute: no training, no browser, no processes
	$(PYTEST) -q -m "not slow"

test: setup ## all tests, the crate's too, but those that build things: see check
	$(CARGO) test -q $(CRATE)
	$(PYTEST) --durations 20 -m "not build"

check: setup book ## what must hold before a commit: book, export, builds, linters
	python book/scan.py
	$(PYTEST) -q -m build
	ruff check $(PYTHON_FILES)
	ruff format --check $(PYTHON_FILES)
	mypy
	python -m mypy.stubtest rustbpe --allowlist dev/stubtest.txt
	$(CARGO) fmt --check $(CRATE)
	$(CARGO) clippy -q --all-targets --features python $(CRATE) -- -D warnings
	python dev/check.py

export: setup ## notebooks to nanochat/*.py, formatted and cleaned
	python dev/markup.py
	ruff format -q nbs
	nbdev-export
	nbdev-clean
	python book/bibliography.py

book: setup ## execute the chapters and render them to book/_build/html
	$(SPHINX) nbs $(BUILD)/html
	@echo "$(BUILD)/html/index.html"

pdf: setup ## the same as one PDF, book/_build/nanochat-book.pdf
	$(SPHINX) -t pdf -b singlehtml nbs $(BUILD)/single
	python book/pdf.py $(BUILD)/single $(BUILD)/nanochat-book.pdf

bench: setup ## measure tokenizer crate and model, alone and against their peers
	$(CARGO) bench $(CRATE)
	python dev/bench_tokenizers.py
	python dev/bench_model.py

# Each file of dev/records, what remakes it, and how long that took on two cores. A time stands
# in the record itself, or it was not measured.
#   speedrun_cpu.json           bash speedrun.sh                       9 minutes
#   attention_maps.json         python dev/attention_maps.py           not measured
#   gpu_baseline.json           python dev/gpu_baseline.py             39 minutes
#   kill_resume.json            python dev/kill_test.py                not measured
#   ranks.json                  python dev/ranks.py                    half a minute
#   scaling.json                python dev/scaling.py                  not measured
#   vocab_study.json            python dev/vocab_study.py              not measured
#   ablation.json               python dev/ablation.py                 not measured
#   race.json                   python dev/race.py                     146 minutes of runs, two at a time
#   model_bench.json            python dev/bench_model.py              not measured
#   optim_bench.json            python dev/bench_optim.py              not measured
#   rustbpe.md                  python dev/bench_tokenizers.py         not measured
#   rustbpe_ablation.md         python dev/ablate_crate.py             not measured
#   tokenizer_compression.json  python dev/tokenizer_compression.py    15 seconds
# A card makes one more, gpu.json: python dev/gpu.py, about seven minutes. REFERENCES is the folder
# of OpenAI's two .tiktoken files. Finished runs of ablation and race are looked up in WORK.
RECORDS := dev/records
REFERENCES ?= $(HOME)/.cache/nanochat/tokenizers
WORK ?= $(BUILD)/records
records: setup ## measure again everything under dev/records (hours; times in the Makefile)
	NANOCHAT_BASE_DIR=$(CURDIR)/$(WORK)/speedrun bash speedrun.sh
	NANOCHAT_BASE_DIR=$(CURDIR)/$(WORK)/speedrun python dev/record.py $(RECORDS)/speedrun_cpu.json
	NANOCHAT_BASE_DIR=$(CURDIR)/$(WORK)/speedrun python dev/attention_maps.py $(RECORDS)/attention_maps.json
	python dev/gpu_baseline.py --record $(RECORDS)/gpu_baseline.json
	python dev/kill_test.py --out $(RECORDS)/kill_resume.json
	python dev/kill_test.py --kills 8 --ranks 2 --out $(RECORDS)/kill_resume.json
	python dev/ranks.py --out $(RECORDS)/ranks.json
	python dev/scaling.py --record $(RECORDS)/scaling.json
	python dev/vocab_study.py --record $(RECORDS)/vocab_study.json
	python dev/ablation.py --work $(WORK)/ablation --record $(RECORDS)/ablation.json
	python dev/race.py --work $(WORK)/race --record $(RECORDS)/race.json
	python dev/bench_model.py --record $(RECORDS)/model_bench.json
	python dev/bench_optim.py --record $(RECORDS)/optim_bench.json
	python dev/bench_tokenizers.py --record $(RECORDS)/rustbpe.md
	python dev/ablate_crate.py --record $(RECORDS)/rustbpe_ablation.md
	python dev/tokenizer_compression.py --reference-dir $(REFERENCES) \
	  --record $(RECORDS)/tokenizer_compression.json

clean: ## remove what was built; notebooks, package and .venv stay
	rm -rf $(BUILD) rustbpe/target .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
