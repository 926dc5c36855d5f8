# make demo   create .venv, install, train the demo models if they are missing, map and merge them
# make test   the same environment, then style checks and all tests
# make bench  the figures of docs/performance.md (about twenty minutes)
# make quality  the figures of docs/quality.md, on the models of make real (an hour at first, then minutes)

PYTHON ?= python3
VENV ?= .venv
# Which PyTorch to install first. On Linux without an NVIDIA GPU this avoids gigabytes of CUDA packages:
#   make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
RUN = $(VENV)/bin/python

.PHONY: demo test bench quality clean

demo: $(VENV)/installed
	$(RUN) demo/make_models.py
	$(RUN) monster_mapper.py --config default-mapper.yaml
	$(RUN) merge_monster.py --config default.yaml --overwrite

test: $(VENV)/tested-with
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m pytest -n 2 --dist loadfile

bench: $(VENV)/installed $(VENV)/tested-with
	$(RUN) benchmarks/bench_merge.py
	$(RUN) benchmarks/bench_merge.py --dtype bfloat16
	$(RUN) benchmarks/bench_mapper.py
	$(RUN) benchmarks/bench_processes.py
	$(RUN) benchmarks/bench_scaling.py --picture images/scaling.png

quality: $(VENV)/installed
	$(RUN) benchmarks/bench_quality.py

clean:
	rm -rf $(VENV) demo/models demo/merged

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet $(TORCH)
	$(RUN) -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/tested-with: tests/requirements.txt $(VENV)/installed
	$(RUN) -m pip install --quiet -r tests/requirements.txt
	touch $@
