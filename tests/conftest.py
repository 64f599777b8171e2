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
    parser.addoption(
        "--processor-times",
        metavar="FILE",
        help="write the processor seconds of each test and its processes to FILE, dearest first",
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
    if config.getoption("--processor-times"):
        config.pluginmanager.register(ProcessorTimes(config.getoption("--processor-times")))


class ProcessorTimes:
    """What each test costs, set-up and tear-down included, whatever else the machine is doing.

    A fixture that several tests share is counted in the first of them, a process that a test
    started once it has ended.
    """

    def __init__(self, path):
        self.path = path
        self.seconds = {}
        self.before = 0.0

    @staticmethod
    def now():
        return sum(os.times()[:4])  # without the last, the clock

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self):
        self.before = self.now()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self):
        report = yield
        now = self.now()
        report.processor_seconds = now - self.before  # travels to the main process of `-n 2`
        self.before = now
        return report

    def pytest_runtest_logreport(self, report):
        spent = self.seconds.get(report.nodeid, 0.0)
        self.seconds[report.nodeid] = spent + getattr(
            report, "processor_seconds", 0.0
        )  # a crash has none

    def pytest_sessionfinish(self, session):
        if hasattr(session.config, "workerinput"):
            return  # the main process writes, for all workers
        rows = sorted(self.seconds.items(), key=lambda row: -row[1])
        with open(self.path, "w") as file:
            file.writelines(f"{seconds:8.2f}  {name}\n" for name, seconds in rows)


@pytest.fixture
def no_exchange(monkeypatch):
    """A system without a step that exchanges two folders."""

    def cannot(a, b):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("vit_common.files.folders.exchange", cannot)
