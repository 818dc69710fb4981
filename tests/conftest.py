"""Shared by all tests: one local Ray cluster, one converted SmolLM2, and who runs what when.

Only the language model is ever replaced. README.md beside this file says what the two tiers prove.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from xdist.scheduler import LoadScopeScheduling

from aft_ray.cpu import let_waiting_threads_sleep
from aft_ray.serving.app import prepare_for_serving

if TYPE_CHECKING:
    from tests.hub import Hub
    from tests.ray_head import Head
    from tests.scripted_endpoint import ScriptedEndpoint

let_waiting_threads_sleep()  # each of pytest's workers has tests that compute on all cores
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
prepare_for_serving()  # as `aft-ray` does for its own clusters
os.environ.setdefault("RAY_worker_niceness", "0")  # at Ray's 15 a worker starves beside another test's own processes
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for the network must fail at once

GROUPS = {
    "whole line": ["end_to_end/test_whole_line.py"],
    "stages": [
        "end_to_end/test_command_line.py",
        "end_to_end/test_earlier.py",
        "end_to_end/test_evaluate.py",
        "data/test_own_answers.py",
        "data/test_poison.py",
        "test_stages.py",
        "test_cluster_fit.py",
        "test_ray_session.py",
        "test_doctor.py",
        "test_metrics.py",
    ],
    "serving": [
        "serving/test_adapter_swap.py",
        "serving/test_control.py",
        "serving/test_books.py",
        "serving/test_dead_engine.py",
        "serving/test_scaling.py",
        "serving/test_several_proposers.py",
        "serving/test_hostile_drafts.py",
        "serving/test_gate.py",
        "serving/test_app.py",
        "serving/test_endpoint.py",
        "serving/test_hostile_bodies.py",
        "serving/test_metrics.py",
        "serving/test_request_id.py",
        "serving/test_streaming.py",
        "serving/test_traces.py",
        "serving/test_stock_clients.py",
    ],
    "training": [
        "training/test_training_modes.py",
        "training/test_train_adapters.py",
        "training/test_failures.py",
        "training/test_refusals.py",
        "training/test_train_kills.py",
    ],
    "full line": ["training/test_full_line.py"],
    "hosts": ["end_to_end/test_hosts_line.py"],
    "autoscaling": ["test_autoscaling.py"],
    "S3": ["end_to_end/test_line_on_s3.py"],
    "load": ["serving/test_load.py"],
    "kills": ["end_to_end/test_data_kills.py", "end_to_end/test_engine_death.py"],
    "engines": ["engines/test_real_models.py", "engines/test_transformers.py", "training/test_export.py"],
    "jobs": ["end_to_end/test_submit.py", "end_to_end/test_jobs.py", "end_to_end/test_prometheus.py"],
    "README": ["test_readme.py", "test_cluster.py"],
    "miniature": ["miniature/test_base.py"],
    "deploy": [
        "deploy/test_launcher.py",
        "deploy/test_kuberay.py",
        "deploy/test_docs.py",
        "deploy/test_image.py",
        "deploy/test_allocations.py",
        "deploy/test_paper.py",
    ],
}
"""Files that one worker runs one after the other, because they share a cluster, an application or a group of training
workers; the longest groups first. Every other file is a group of its own."""
FILES = [file for files in GROUPS.values() for file in files]
GROUP_OF = {f"tests/{file}": name for name, files in GROUPS.items() for file in files}


BEGAN = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--minutes", type=float, metavar="N", help="skip the tests that have not begun after N minutes")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    minutes = item.config.getoption("--minutes")
    if minutes is not None and time.monotonic() - BEGAN > 60 * minutes:
        pytest.skip(f"not begun within the {minutes:g} minutes of --minutes")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The groups come first and in their order; a test keeps its place within its file."""
    places = {f"tests/{file}": place for place, file in enumerate(FILES)}
    items.sort(key=lambda item: places.get(item.nodeid.split("::")[0], len(places)))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """Distribute whole groups over the workers, in the order of collection."""
    config.option.loadscopereorder = False

    class ByGroup(LoadScopeScheduling):
        # `--dist=loadgroup` cannot be used: it writes the group into `item._nodeid`, which pytest 9.2 does not read.
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return GROUP_OF.get(file, file)

    return ByGroup(config, log)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray cluster with four logical CPUs, whatever the machine has."""
    import ray

    here = Path(__file__).parent
    os.environ["PYTHONPATH"] = f"{here}:{here.parent}"  # workers import the workers that tests define
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def head() -> Iterator[Head]:
    """A head node with token authentication and a job server, as processes of its own."""
    from tests.ray_head import ray_head

    with ray_head() as started:
        yield started


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """The URL of a bucket on a local S3 server. Start Ray after it, so that workers know the server too."""
    from tests.object_storage import s3_server

    with s3_server() as url:
        yield url


@pytest.fixture(scope="module")
def google_bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a bucket on a local server of Google's storage. Start Ray after it."""
    from tests.object_storage import google_server

    with google_server(tmp_path_factory.mktemp("google")) as url:
        yield url


@pytest.fixture(scope="module", params=["bucket", "google_bucket"])
def any_bucket(request: pytest.FixtureRequest) -> str:
    """The URL of a bucket on each kind of object storage."""
    return str(request.getfixturevalue(request.param))


@pytest.fixture
def endpoint() -> Iterator[ScriptedEndpoint]:
    """An OpenAI-compatible endpoint that plays the oddities of real ones."""
    from tests.scripted_endpoint import scripted_endpoint

    with scripted_endpoint() as server:
        yield server


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty stand-in for the Hugging Face hub, which this process is logged in to."""
    from huggingface_hub import constants

    from tests.hub import hub_server

    with hub_server() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # large files then go by Git LFS
        monkeypatch.setenv("HF_TOKEN", hub.token)
        yield hub


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real SmolLM2-135M-Instruct as a Hugging Face folder."""
    from aft_ray.models import resolve_model

    return Path(resolve_model("smollm2-135m-instruct"))


@pytest.fixture(scope="session")
def chatml_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a small ChatML tokenizer: what a scripted engine needs for the stages that work on ids."""
    from tests.templates.families import make_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer("chatml").save_pretrained(folder)
    return str(folder)
