"""The command line: `aft-ray run --config configs/quickstart.yaml`. Parse, import, call; errors become exit codes.

0 done   2 usage or config error   3 more failures than allowed   4 resume refused   130 interrupted

Heavy imports come after parsing, so `--help` and a wrong key answer in under a second.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from aft_ray.data import DATA_STAGES
from aft_ray.errors import AftError
from aft_ray.pipeline import LINE

app = typer.Typer(
    help="Aggregation Fine-Tuning on Ray: build the data, train, serve, evaluate.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigFile = Annotated[Path, typer.Option("--config", "-c", help="The run's YAML file.")]
Overrides = Annotated[list[str], typer.Option("--set", help="Change one setting: --set proposals.num_per_prompt=8")]
ResumeMode = Annotated[
    Literal["auto", "never", "must"],
    typer.Option("--resume", help="auto: continue what is there; never: only a new folder; must: only an old one."),
]


def _steps(names: tuple[str, ...], config: Path, overrides: list[str], resume: Any, retry_failed: bool = False) -> None:
    from aft_ray.config import load_config

    loaded = load_config(config, overrides)
    from aft_ray.pipeline.steps import run_steps

    try:
        run = run_steps(loaded, names, resume, retry_failed)
    except KeyboardInterrupt:
        print("interrupted; the same command continues from here", file=sys.stderr)
        raise typer.Exit(130) from None
    if "report" in names:
        from aft_ray.pipeline.summary import print_results

        print_results(run)


@app.command()
def run(
    config: ConfigFile,
    overrides: Overrides = [],  # noqa: B006 (typer reads the default)
    resume: ResumeMode = "auto",
    until: Annotated[str | None, typer.Option(help=f"Last step to run: {', '.join(LINE)}.")] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try rows again that failed before, and only those.")
    ] = False,
) -> None:
    """Run every step from prompts to report. The same command resumes where it stopped."""
    if until is not None and until not in LINE:
        raise typer.BadParameter(f"{until!r} is not a step; the steps are {', '.join(LINE)}", param_hint="--until")
    last = LINE.index(until) + 1 if until else len(LINE)
    _steps(LINE[:last], config, overrides, resume, retry_failed)


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = [],  # noqa: B006
    resume: ResumeMode = "auto",
    show_batch: Annotated[
        bool, typer.Option("--show-batch", help="Print the first batch, trained tokens marked, and train nothing.")
    ] = False,
) -> None:
    """Train the adapters of a run whose training set is finished."""
    if show_batch:
        from aft_ray.config import load_config
        from aft_ray.pipeline.preview import show_first_batch

        return show_first_batch(load_config(config, overrides))
    _steps(("train",), config, overrides, resume)


@app.command()
def evaluate(config: ConfigFile, overrides: Overrides = [], resume: ResumeMode = "auto") -> None:  # noqa: B006
    """Ask the run's endpoint the held-out prompts, measure perplexities, and write the report."""
    _steps(("evaluate", "report"), config, overrides, resume)


@app.command()
def report(config: ConfigFile, overrides: Overrides = []) -> None:  # noqa: B006
    """Write the report again from what the run folder holds."""
    _steps(("report",), config, overrides, "must")


@app.command()
def export(
    config: ConfigFile,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; it must not be there yet.")],
    overrides: Overrides = [],  # noqa: B006
    variant: Annotated[str | None, typer.Option(help="Which one, where several are trained.")] = None,
    merged: Annotated[bool, typer.Option("--merged", help="Merge the adapter into the base model's weights.")] = False,
) -> None:
    """Copy a trained adapter, or the whole model with the adapter merged in, to a self-contained folder."""
    from aft_ray.config import load_config

    loaded = load_config(config, overrides)
    from aft_ray.training.export import export_model, find_trained

    settings = [part for override in overrides for part in ("--set", override)]
    command = shlex.join(["aft-ray", "run", "--config", str(config), *settings, "--until", "train"])
    trained = find_trained(loaded, variant, command)
    is_new = export_model(trained, output, merged)
    print(f"{output}: {trained.variant}{'' if is_new else ' is there already, from this very training'}")


@app.command()
def serve(config: ConfigFile, overrides: Overrides = []) -> None:  # noqa: B006
    """Serve the run's base model and adapters behind an OpenAI-compatible endpoint, until interrupted.

    The first Ctrl-C (or SIGTERM) finishes open requests and refuses new ones; the second one stops at once.
    """
    from aft_ray.config import load_config

    loaded = load_config(config, overrides)
    from aft_ray.pipeline.cluster import RaySession
    from aft_ray.pipeline.evaluate import serving_of
    from aft_ray.runs import Run
    from aft_ray.serving import drain, serve_app, stop
    from aft_ray.storage import Folder

    serving = serving_of(Run(loaded, Folder.at(loaded.run.dir)))
    with RaySession(loaded) as session:
        session.connect()
        print(f"starting: {serving.base_name}, {', '.join(serving.adapters or {}) or 'no adapters yet'}", flush=True)
        base_url = serve_app(serving)
        print(f"serving at {base_url}/v1   default model: {serving.default_model}   stop with Ctrl-C", flush=True)
        try:
            _wait_for_interrupt()
            print("stopping when the requests under way have ended; Ctrl-C again stops now", flush=True)
            drain()
        finally:
            stop()


def _wait_for_interrupt() -> None:
    import signal
    import threading

    stopped = threading.Event()
    before = {which: signal.getsignal(which) for which in (signal.SIGTERM, signal.SIGINT)}
    for which in before:
        signal.signal(which, lambda *_: stopped.set())
    while not stopped.wait(1):
        pass
    for which, handler in before.items():
        signal.signal(which, handler)


@app.command()
def ask(
    question: str,
    base_url: Annotated[str, typer.Option(help="Where the endpoint is.")] = "http://127.0.0.1:8000",
    model: Annotated[str, typer.Option(help="Model name or alias, such as aft@k5-l2.")] = "",
    api_key: Annotated[str, typer.Option(envvar="AFT_RAY_API_KEY", help="Key, where the server wants one.")] = "none",
    show_proposals: Annotated[bool, typer.Option("--show-proposals", help="Print every draft as well.")] = False,
) -> None:
    """Ask a served model one question and print the answer as it is generated."""
    from aft_ray.pipeline.asking import ask_and_print

    ask_and_print(question, base_url.rstrip("/"), model, api_key, show_proposals)


@app.command()
def plan(config: ConfigFile, overrides: Overrides = []) -> None:  # noqa: B006
    """Print the resolved settings and an estimate of tokens, hours and cost. This starts nothing."""
    from aft_ray.config import load_config

    loaded = load_config(config, overrides)
    import yaml

    print(yaml.safe_dump(loaded.model_dump(mode="json"), sort_keys=False), end="")
    proposals, candidates = loaded.proposals.num_per_prompt, loaded.targets.num_candidates
    print(f"# answers sampled per prompt: {proposals} proposals + {candidates} target candidates")
    print(f"# answers sampled per held-out prompt and system: {loaded.evaluation.plan.num_samples}")
    from aft_ray.pipeline.preview import print_plan

    print_plan(loaded)


@app.command()
def preview(
    config: ConfigFile,
    overrides: Overrides = [],  # noqa: B006
    num_prompts: Annotated[int, typer.Option("-n", min=1, help="Prompts to take through every data stage.")] = 4,
) -> None:
    """Run a few prompts through every data stage and print them, trained tokens marked. `plan` extrapolates this."""
    from aft_ray.config import load_config

    loaded = load_config(config, overrides)
    from aft_ray.pipeline.preview import preview_config, show
    from aft_ray.pipeline.steps import run_steps

    show(run_steps(preview_config(loaded, num_prompts), DATA_STAGES))


@app.command()
def submit(
    step: Annotated[str, typer.Argument(help="A script of jobs/, without .py: pipeline, proposals, train, ...")],
    config: ConfigFile,
    overrides: Overrides = [],  # noqa: B006
    resume: ResumeMode = "auto",
    address: Annotated[
        str, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="The cluster's job server.")
    ] = "http://127.0.0.1:8265",
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Return as soon as the job is accepted.")] = False,
) -> None:
    """Submit a step to a Ray cluster as a job, with this checkout as its working directory."""
    from aft_ray.config import load_config

    loaded = load_config(config, overrides)  # a wrong key is answered here, not on the cluster
    from aft_ray.pipeline.submitting import check_paths, submit_job

    check_paths(loaded)
    raise typer.Exit(submit_job(step, config, overrides, resume, address, wait=not no_wait))


@app.command()
def doctor() -> None:
    """Print this machine's versions, cores, memory and GPUs, and what is missing."""
    from aft_ray.pipeline.checkup import checkup

    raise typer.Exit(checkup())


def guarded(work: Callable[[], Any]) -> int:
    """Run `work` and return its exit code. This is the outermost frame of the process, so no error passes it."""
    try:
        work()
    except AftError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def main() -> None:
    """Run the `aft-ray` command line; this is its entry point."""
    sys.exit(guarded(app))


def job(*names: str) -> None:
    """Run the named steps with the flags of `aft-ray run`; this is the entry point of `python jobs/<stage>.py`."""
    script = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

    @script.command(help=(sys.modules["__main__"].__doc__ or "").strip())
    def command(
        config: ConfigFile,
        overrides: Overrides = [],  # noqa: B006
        resume: ResumeMode = "auto",
        retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try failed rows again.")] = False,
    ) -> None:
        _steps(names, config, overrides, resume, retry_failed)

    sys.exit(guarded(script))
