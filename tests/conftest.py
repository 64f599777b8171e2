"""Settings of the whole suite, made before JAX and torch start."""

import errno
import importlib.metadata
import os
import signal
from collections import Counter

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


# test -> how many of its cases run each time; `make test-slow` runs them all. What the others of
# these have in common with the first is most of what they show, and together they are a minute.
REPRESENTED_BY = {
    "test_axes_of_layouts": 1,
    "test_the_commands": 1,
    "test_the_cost_on_held_out_digits": 1,
    "test_killed_at_any_step_a_folder_is_old_or_new": 1,
    "test_features_are_those_of_transformers": 1,
    "test_hybrids_of_timm_in_both_twins": 2,
    "test_a_name": 1,
    "test_against_the_flax_reference_through_its_files": 3,
    "test_both_twins_and_the_numpy_network_are_timms": 4,
    "test_a_run_goes_on_to_the_bit_and_a_bad_image_is_named_once": 1,
    "test_checks": 2,
    "test_counts_of_timms_models": 5,
    "test_dinov2": 2,
    "test_equals_transformers_on_random_cases": 3,
    "test_errors_never_repeat_an_image": 2,
    "test_every_stage": 2,
    "test_every_stage_of_the_base_network": 1,
    "test_extensions_of_vit_in_both_twins": 4,
    "test_few_tensors_are_alive_at_once": 6,
    "test_files_of_extensions": 8,
    "test_flax_shards_are_those_of_transformers": 2,
    "test_forbidden_imports": 4,
    "test_google_directly_and_converted": 4,
    "test_image_files_however_they_are_given": 2,
    "test_kernel_for_processors_against_torch": 5,
    "test_kernel_of_whole_images_against_torch": 3,
    "test_logits_are_those_of_the_torch_reference": 4,
    "test_loading_holds_little_more_than_the_weights": 1,
    "test_losses_and_their_gradients_against_the_torch_reference": 1,
    "test_outputs_and_gradients_under_the_same_masks": 3,
    "test_stochastic_depth": 3,
    "test_timm_builds_what_is_written_for_it": 4,
    "test_the_flax_modules_parameters": 3,
    "test_timm_directly_and_converted": 10,
    "test_transformers_flax_reads_what_we_write": 2,
    "test_vision_transformer_by_its_own_names": 2,
    "test_taylor_series": 1,
    "test_timm_wrapper_folders_are_timms": 1,
    "test_trainer": 1,
    "test_trees_of_transformers": 1,
    "test_without_jit": 1,
    "test_what_changes_the_network_is_never_left_over": 5,
    "test_what_was_loaded_once_loads_without_the_hub": 2,
}


@pytest.hookimpl(tryfirst=True)  # before `-m "not slow"` is applied
def pytest_collection_modifyitems(items):
    seen = Counter()
    for item in items:
        name = getattr(item, "originalname", item.name)
        if name in REPRESENTED_BY and item.get_closest_marker("slow") is None:
            seen[item.path, name] += 1
            if seen[item.path, name] > REPRESENTED_BY[name]:
                item.add_marker(pytest.mark.slow)


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
