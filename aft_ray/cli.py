"""The command line: `aft-ray run --config configs/quickstart.yaml`. Parse, import, call; errors become exit codes.

0 done   2 usage or config error   3 more failures than allowed   4 resume refused   130 interrupted

Heavy imports come after parsing, so `--help` and a wrong key answer in under a second.
"""

from __future__ import annotations

import contextlib
import errno
import shlex
import sys
from collections.abc import Callable, Iterator
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

ConfigFiles = Annotated[
    list[str],
    typer.Option("--config", "-c", help="The run's YAML file (path or URL). Give it several times for several runs."),
]
ConfigFile = Annotated[str, typer.Option("--config", "-c", help="The run's YAML file (path or URL).")]
Overrides = Annotated[list[str], typer.Option("--set", help="Change one setting: --set proposals.num_per_prompt=8")]
ResumeMode = Annotated[
    Literal["auto", "never", "must"],
    typer.Option(
        "--resume", help="auto: start or continue the run; never: only start a new one; must: only continue one."
    ),
]

LOCAL_JOB_SERVER = "http://127.0.0.1:8265"
JobServerAddress = Annotated[
    str, typer.Option("--address", envvar="RAY_API_SERVER_ADDRESS", help="The cluster's job server.")
]
JobId = Annotated[str, typer.Argument(help="The job's id, as `aft-ray jobs` lists it.")]


def _steps(names: tuple[str, ...], config: str, overrides: list[str], resume: Any, retry_failed: bool = False) -> None:
    from aft_ray.config import load_config

    loaded = load_config(config, overrides)
    from aft_ray.pipeline.steps import run_steps

    with _interruptible():
        run = run_steps(loaded, names, resume, retry_failed)
    if "report" in names:
        from aft_ray.pipeline.summary import print_results

        print_results(run)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """End the command with one sentence and 130 at Ctrl-C and at SIGTERM."""
    from aft_ray.pipeline.interruption import stop_on_sigterm

    try:
        with stop_on_sigterm():
            yield
    except KeyboardInterrupt as error:
        print(f"{str(error) or 'interrupted'}; the same command continues from here", file=sys.stderr)
        raise typer.Exit(130) from None


@app.command()
def run(
    config: ConfigFiles,
    overrides: Overrides = [],  # noqa: B006 (typer reads the default)
    resume: ResumeMode = "auto",
    until: Annotated[str | None, typer.Option(help=f"Last step to run: {', '.join(LINE)}.")] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Retry only the rows that failed before.")
    ] = False,
) -> None:
    """Run every step from prompts to report. The same command resumes where it stopped."""
    if until is not None and until not in LINE:
        raise typer.BadParameter(f"{until!r} is not a step; the steps are {', '.join(LINE)}", param_hint="--until")
    names = LINE[: LINE.index(until) + 1 if until else len(LINE)]
    if len(config) == 1:
        return _steps(names, config[0], overrides, resume, retry_failed)
    from aft_ray.config import load_config

    loaded = [load_config(one, overrides) for one in config]
    from aft_ray.pipeline.sweep import run_sweep

    with _interruptible():
        raise typer.Exit(run_sweep(loaded, names, resume, retry_failed))


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = [],  # noqa: B006
    resume: ResumeMode = "auto",
    show_batch: Annotated[
        bool, typer.Option("--show-batch", help="Only print the first batch, with the trained tokens marked.")
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
    """Answer the held-out prompts with the run's models, measure perplexities, and write the report."""
    _steps(("evaluate", "report"), config, overrides, resume)


@app.command()
def report(
    run: Annotated[str | None, typer.Argument(help="The run's folder or URL, instead of --config.")] = None,
    config: Annotated[str | None, typer.Option("--config", "-c", help="The run's YAML file (path or URL).")] = None,
    overrides: Overrides = [],  # noqa: B006
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write the report to, instead of the run's own.")
    ] = None,
) -> None:
    """Write the report again from the files in the run folder, also while the run is in progress."""
    if (run is None) == (config is None):
        raise typer.BadParameter("give the run's folder, or --config", param_hint="RUN")
    from aft_ray.config import load_config
    from aft_ray.pipeline import summary

    file, changes = (config, overrides) if config is not None else (summary.settings_of(run or ""), [f"run.dir={run}"])
    loaded = load_config(file, changes)
    if output is not None:
        summary.print_results(*summary.write_report_to(loaded, output))
    elif (there := summary.finished_report(loaded)) is not None:
        print(
            "the run folder cannot be written to; this is the report that it has. --output writes a new one elsewhere",
            file=sys.stderr,
        )
        summary.print_results(there)
    elif not summary.report_under_way(loaded):
        _steps(("report",), file, changes, "must")


@app.command()
def export(
    config: ConfigFile,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; it must not exist yet.")],
    overrides: Overrides = [],  # noqa: B006
    variant: Annotated[str | None, typer.Option(help="Variant to export, if several are trained.")] = None,
    merged: Annotated[bool, typer.Option("--merged", help="Merge the adapter into the base model's weights.")] = False,
) -> None:
    """Copy a trained adapter, or the whole model with the adapter merged in, to a self-contained folder."""
    from aft_ray.config import load_config

    loaded = load_config(config, overrides)
    from aft_ray.training.export import export_model, find_trained

    settings = [part for override in overrides for part in ("--set", override)]
    command = shlex.join(["aft-ray", "run", "--config", config, *settings, "--until", "train"])
    trained = find_trained(loaded, variant, command)
    is_new = export_model(trained, output, merged)
    print(f"{output}: {trained.variant}{'' if is_new else ' is there already, from this very training'}")


@app.command()
def dataset(
    config: ConfigFile,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; it must not exist yet.")],
    overrides: Overrides = [],  # noqa: B006
    file_format: Annotated[
        Literal["jsonl", "parquet"], typer.Option("--format", help="Format of the files.")
    ] = "jsonl",
) -> None:
    """Write the training set as conversations (`messages`) for TRL, axolotl or LLaMA-Factory, with its card."""
    from aft_ray.config import load_config

    loaded = load_config(config, overrides)
    from aft_ray.data.messages import write_dataset
    from aft_ray.runs import Run
    from aft_ray.storage import Folder

    counts = write_dataset(Run(loaded, Folder.at(loaded.run.dir)), output, file_format)
    for name, count in counts.items():
        print(f"{output}/{name}: {count} examples")


@app.command()
def push(
    repo: Annotated[str, typer.Argument(help="OWNER/NAME on the Hugging Face hub; created if it does not exist.")],
    config: ConfigFile,
    what: Annotated[Literal["dataset", "adapter", "merged"], typer.Option(help="What to upload.")],
    overrides: Overrides = [],  # noqa: B006
    variant: Annotated[str | None, typer.Option(help="Variant to upload, if several are trained.")] = None,
    file_format: Annotated[
        Literal["jsonl", "parquet"], typer.Option("--format", help="Format of the files of a data set.")
    ] = "jsonl",
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be uploaded.")] = False,
) -> None:
    """Upload the training set, an adapter or the merged model to the Hugging Face hub."""
    from aft_ray.hub import check_repository

    check_repository(repo)
    from aft_ray.config import load_config

    loaded = load_config(config, overrides)
    from aft_ray.pipeline.pushing import push as upload

    upload(loaded, repo, what, variant=variant, file_format=file_format, private=private, dry_run=dry_run)


@app.command()
def serve(config: ConfigFile, overrides: Overrides = []) -> None:  # noqa: B006
    """Serve the run's base model and adapters behind an OpenAI-compatible endpoint, until interrupted.

    The first Ctrl-C (or SIGTERM) finishes open requests and refuses new ones; the second one stops at once.
    """
    from aft_ray.config import load_config

    loaded = load_config(config, overrides)
    from aft_ray.pipeline.cluster import RaySession
    from aft_ray.pipeline.environment import read_environment
    from aft_ray.pipeline.evaluate import app_name, serving_of
    from aft_ray.runs import Run
    from aft_ray.serving import content_named, drain, serve_app, stop
    from aft_ray.storage import Folder

    read_environment(loaded)
    run = Run(loaded, Folder.at(loaded.run.dir))
    serving, name = serving_of(run), app_name(run)
    with RaySession(loaded) as session:
        session.connect()
        print(f"starting: {serving.base_name}, {', '.join(serving.adapters or {}) or 'no adapters yet'}", flush=True)
        base_url = serve_app(content_named(serving), name=name)
        print(f"serving at {base_url}/v1   default model: {serving.default_model}   stop with Ctrl-C", flush=True)
        try:
            _wait_for_interrupt()
            print("stopping when the requests under way have ended; Ctrl-C again stops now", flush=True)
            drain(name)
        finally:
            stop(name)


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
    base_url: Annotated[str, typer.Option(help="The endpoint's URL.")] = "http://127.0.0.1:8000",
    model: Annotated[str, typer.Option(help="Model name or alias, such as aft@k5-l2.")] = "",
    api_key: Annotated[
        str, typer.Option(envvar="AFT_RAY_API_KEY", help="The server's key, if it requires one.")
    ] = "none",
    show_proposals: Annotated[bool, typer.Option("--show-proposals", help="Print every draft as well.")] = False,
) -> None:
    """Ask a served model one question and print the answer as it is generated."""
    from aft_ray.pipeline.asking import ask_and_print

    ask_and_print(question, base_url.rstrip("/").removesuffix("/v1"), model, api_key, show_proposals)


@app.command()
def plan(config: ConfigFile, overrides: Overrides = []) -> None:  # noqa: B006
    """Print the resolved settings and an estimate of tokens, hours and cost. This starts nothing."""
    from aft_ray.config import load_config

    loaded = load_config(config, overrides)
    import yaml

    from aft_ray.pipeline.checks import check_before_start

    check_before_start(loaded)
    print(yaml.safe_dump(loaded.model_dump(mode="json"), sort_keys=False), end="")
    if loaded.makes_targets:
        proposals, candidates = loaded.proposals.num_per_prompt, loaded.targets.num_candidates
        print(f"# answers sampled per prompt: {proposals} proposals + {candidates} target candidates")
    print(f"# answers sampled per held-out prompt and system: {loaded.evaluation.plan.num_samples}")
    from aft_ray.pipeline.preview import print_plan

    print_plan(loaded)


@app.command()
def preview(
    config: ConfigFile,
    overrides: Overrides = [],  # noqa: B006
    num_prompts: Annotated[
        int, typer.Option("-n", min=1, help="Number of prompts to take through every data stage.")
    ] = 4,
) -> None:
    """Take a few prompts through every data stage and print the results. `plan` extrapolates from them."""
    from aft_ray.config import load_config

    loaded = load_config(config, overrides)
    from aft_ray.pipeline.preview import preview_config, show
    from aft_ray.pipeline.steps import run_steps

    show(run_steps(preview_config(loaded, num_prompts), DATA_STAGES))


@app.command()
def submit(
    step: Annotated[str, typer.Argument(help="The step to run: pipeline (all of them), proposals, train, ...")],
    config: ConfigFiles,
    overrides: Overrides = [],  # noqa: B006
    resume: ResumeMode = "auto",
    address: JobServerAddress = LOCAL_JOB_SERVER,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Follow the job until it ends, or return once the cluster has it.")
    ] = True,
) -> None:
    """Run a step on a Ray cluster as a job, follow it, and end with its exit code.

    The job gets the package, jobs/, configs/ and the files that the config names; secrets are never sent.
    """
    from aft_ray.config import load_config

    loaded = [load_config(one, overrides) for one in config]  # a wrong key is answered here, not on the cluster
    from aft_ray.pipeline.submitting import submit_job

    raise typer.Exit(submit_job(step, config, loaded, overrides, resume, address, wait=wait))


@app.command()
def jobs(address: JobServerAddress = LOCAL_JOB_SERVER) -> None:
    """List the jobs of a cluster, the newest first."""
    from aft_ray.pipeline.jobs import print_jobs

    print_jobs(address)


@app.command()
def logs(
    job: JobId,
    address: JobServerAddress = LOCAL_JOB_SERVER,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Follow the log until the job ends.")] = False,
) -> None:
    """Print the log of a job. With --follow, end with the exit code of the job."""
    from aft_ray.pipeline.jobs import print_logs

    raise typer.Exit(print_logs(address, job, following=follow))


@app.command()
def status(
    job_or_run: Annotated[str, typer.Argument(help="A job's id, or a run's folder or URL.", metavar="JOB|RUN")],
    address: JobServerAddress = LOCAL_JOB_SERVER,
) -> None:
    """Print which steps of a run are done, running or failed, and how fast they are."""
    from aft_ray.pipeline.jobs import print_status

    print_status(address, job_or_run)


@app.command()
def stop(job: JobId, address: JobServerAddress = LOCAL_JOB_SERVER) -> None:
    """Stop a job. Finished work is kept, and submitting the job again continues it."""
    from aft_ray.pipeline.jobs import stop_job

    stop_job(address, job)


@app.command(name="job", hidden=True)
def run_job(
    step: Annotated[str, typer.Argument(help="The step, or pipeline for all of them.")],
    config: ConfigFile,
    overrides: Overrides = [],  # noqa: B006
    resume: ResumeMode = "auto",
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Retry the rows that failed before.")] = False,
) -> None:
    """Run one step: what `submit` sends to a cluster where there is no jobs/ folder."""
    if step not in (*LINE, "pipeline"):
        raise typer.BadParameter(f"{step!r} is not a step; the steps are {', '.join(LINE)}", param_hint="STEP")
    _steps(LINE if step == "pipeline" else (step,), config, overrides, resume, retry_failed)


@app.command()
def doctor(
    config: Annotated[
        str | None, typer.Option("--config", "-c", help="Also check everything that this run needs.")
    ] = None,
    overrides: Overrides = [],  # noqa: B006
    address: Annotated[str | None, typer.Option(help="Check this job server's cluster, with a job on it.")] = None,
) -> None:
    """Check this machine and, with --config, what a run needs: settings, storage, workers, models, keys.

    Every problem comes with what to do about it. If there is any, the exit code is 2.
    """
    from aft_ray.pipeline.checkup import checkup

    raise typer.Exit(checkup(config, overrides, address))


OF_THIS_MACHINE = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.EMFILE,
    errno.ENFILE,
}  # fmt: skip
"""Errors of disks and permissions, which no code can mend."""


def guarded(work: Callable[[], Any]) -> int:
    """Run `work` and return its exit code. This is the outermost frame of the process, so no error passes it."""
    try:
        work()
    except AftError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if error.errno not in OF_THIS_MACHINE:
            raise
        print(f"error: {error.filename or 'this machine'}: {error.strerror}", file=sys.stderr)
        return 1
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
        retry_failed: Annotated[
            bool, typer.Option("--retry-failed", help="Retry the rows that failed before.")
        ] = False,
    ) -> None:
        _steps(names, config, overrides, resume, retry_failed)

    sys.exit(guarded(script))
