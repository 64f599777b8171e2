"""Settings of the whole suite, made before JAX and torch start."""

import errno
import importlib.metadata
import os
import signal

import pytest

# The suite compiles many small networks and runs each once or twice: LLVM's optimisation would
# take longer than the runs (gradients of two blocks: 17 s and 7 s). XLA's own passes, fusion
# among them, are as always. Set XLA_FLAGS yourself, or empty, to have it otherwise.
_FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if importlib.metadata.version("jaxlib") == "0.10.2":
    # A fifth of the suite's processor time; later versions may not know these, and abort.
    _FLAGS += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
os.environ.setdefault("XLA_FLAGS", _FLAGS)
# The networks are tiny: PyTorch's threads would wait for each other longer than they compute, most
# of all where the cores are shared (gradients of two blocks: 5 s and 0.2 s).
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tests write nothing into the home of who runs them.
os.environ.setdefault("VIT_COMPILATION_CACHE", "")


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        choices=("cpu", "gpu", "tpu"),
        default="cpu",
        help="what JAX runs the networks on (default: cpu); the PyTorch twins stay on the CPU",
    )


def pytest_configure(config):
    # A script that starts pytest with `&` has it ignore Ctrl-C, and the processes of tests would
    # inherit that; commands leave it so, as under nohup, and the tests of Ctrl-C would wait.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    device = config.getoption("--device")
    # Read by JAX when it starts; tests of the CPU's numbers are to run on the CPU everywhere.
    os.environ["JAX_PLATFORMS"] = {"cpu": "cpu", "gpu": "cuda,cpu", "tpu": "tpu,cpu"}[device]
    if device == "gpu":
        # By default JAX takes most of the GPU's memory at once, and torch has none left.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


@pytest.fixture
def no_exchange(monkeypatch):
    """A system without a step that exchanges two folders."""

    def cannot(a, b):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("vit_common.files.folders.exchange", cannot)
