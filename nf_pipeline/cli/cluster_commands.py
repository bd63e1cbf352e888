"""The commands for clusters: submit a run as a job, print what a worker advertises."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nf_pipeline.cli.options import config_from, config_options, debug_option, json_option
from nf_pipeline.errors import EXIT_INTERRUPTED

if TYPE_CHECKING:
    from nf_pipeline.executors.ray_jobs import Job, RayJobs


@click.command(
    "submit",
    short_help="Train as a job of a Ray cluster.",
    epilog="Example: nf-pipeline submit --address http://head:8265 --data s3://images/birds --memory-budget 6GiB "
    "--store s3://runs/nf --run birds --env AWS_ENDPOINT_URL",
)
@config_options
@click.option("--no-wait", is_flag=True, help="Print the job's id and return, without following its log.")
@click.option(
    "--env",
    "variables",
    multiple=True,
    metavar="NAME",
    help="Hand this variable of your environment on to the job; may be repeated. Ray shows the environment of jobs "
    "to everybody who may use its API: credentials are refused, they are configured on the cluster.",
)
@click.option(
    "--working-dir",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Ship this folder too, for a --model package.module:factory; .rayignore and .gitignore are heeded, .env "
    "stays here.  [default: nothing but the configuration]",
)
@json_option
@debug_option
def submit_command(
    *,
    no_wait: bool,
    variables: tuple[str, ...],
    working_dir: Path | None,
    as_json: bool,
    address: str | None,
    **given: Any,
) -> int:
    """Train as a job of a Ray cluster; follow its log and end with its exit code.

    Takes the settings of train. The same command again follows the job that trains the run, or starts the next one,
    which continues the run where it is. The cluster must have nf_pipeline installed.

    Ctrl-C leaves the job running; on a terminal you are asked whether to stop it.
    """
    config = config_from({**given, "address": None})
    from nf_pipeline.driver.submit import jobs_address, prepare, submit
    from nf_pipeline.executors.ray_jobs import RayJobs

    target = jobs_address(address)
    request = prepare(config, variables, working_dir)
    for note in request.notes:
        print(f"note: {note}", file=sys.stderr)
    jobs = RayJobs(target)
    job, was_there = submit(jobs, request)
    what = f"job {job.submission_id} trains it already" if was_there else f"submitted as job {job.submission_id}"
    print(f"{request.run_uri}: {what}\n{_commands(jobs, job)}", file=sys.stderr)
    if not no_wait:
        job = _followed(jobs, job, log_to_stderr=as_json)
    return _report(jobs, job, request.run_uri, as_json=as_json, waited=not no_wait)


def _give_address_its_meaning() -> None:
    """The other commands join a cluster at --address; here it is where jobs are submitted."""
    for parameter in submit_command.params:
        if isinstance(parameter, click.Option) and parameter.name == "address":
            parameter.help = (
                "Dashboard of the cluster's head, such as http://head:8265.  "
                "[default: RAY_API_SERVER_ADDRESS or RAY_ADDRESS, or http://127.0.0.1:8265]"
            )


_give_address_its_meaning()


@click.command(
    "worker-resources",
    short_help="Print what ray start takes, for placement by memory.",
    epilog="Example: ray start --address=head:6379 $(nf-pipeline worker-resources)",
)
@click.option("--gpu", metavar="I", help="Position in PCI order, or UUID, of the card.  [default: the only one]")
@click.option(
    "--reserve",
    default="512MiB",
    show_default=True,
    metavar="SIZE",
    help="Part of a card that is not for training: what the CUDA context takes.",
)
@click.option(
    "--memory",
    metavar="SIZE",
    help="What training may hold on this worker.  [default: the card less --reserve; nothing of a CPU worker]",
)
@json_option
@debug_option
def worker_resources_command(gpu: str | None, reserve: str, memory: str | None, as_json: bool) -> None:
    """Print what `ray start` takes on this worker, so that blocks are placed by memory.

    One raylet per GPU: a machine with several runs ray start once for each, with CUDA_VISIBLE_DEVICES and --gpu.
    CUDA_VISIBLE_DEVICES= (empty) makes a CPU worker of a machine that has GPUs.
    """
    from nf_pipeline.gpus import find_gpus, read_driver, visible_gpus
    from nf_pipeline.worker_resources import advertise

    reserve_bytes = _size("--reserve", reserve)
    memory_bytes = None if memory is None else _size("--memory", memory)
    driver = read_driver()
    if driver.fix:
        print(f"note: {driver.problem}, so that no GPU can be seen: {driver.fix}", file=sys.stderr)
    gpus = visible_gpus(driver.gpus)
    if gpu is not None:
        gpus = find_gpus(gpus, gpu, f"--gpu {gpu}")
    worker = advertise(gpus, reserve_bytes, memory_bytes)
    for note in worker.notes:
        print(f"note: {note}", file=sys.stderr)
    print(json.dumps(worker.to_json()) if as_json else " ".join(worker.words))


def _size(option: str, text: str) -> int:
    from nf_pipeline.errors import ConfigError
    from nf_pipeline.units import parse_bytes

    try:
        return parse_bytes(text)
    except ValueError as error:
        raise ConfigError(f"{option}: {error}", f"{option} 512MiB") from None


def _commands(jobs: RayJobs, job: Job) -> str:
    where = f"--address {jobs.address} {job.submission_id}"
    return f"follow: ray job logs --follow {where}\nstop:   ray job stop {where}"


def _followed(jobs: RayJobs, job: Job, *, log_to_stderr: bool) -> Job:
    """Copies the log until the job ends; Ctrl-C ends this command, and the job only if a person says so."""
    try:
        for piece in jobs.follow(job.submission_id):
            print(piece, end="", flush=True, file=sys.stderr if log_to_stderr else sys.stdout)
        return jobs.get(job.submission_id)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        if _wants_it_stopped(job):
            print(f"job {job.submission_id} is {jobs.stop(job.submission_id).status}", file=sys.stderr)
        else:
            print(f"job {job.submission_id} goes on\n{_commands(jobs, job)}", file=sys.stderr)
        raise click.exceptions.Exit(EXIT_INTERRUPTED) from None


def _wants_it_stopped(job: Job) -> bool:
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    try:
        return click.confirm(f"stop job {job.submission_id} too?", default=False, err=True)
    except click.Abort:  # Ctrl-C again
        print(file=sys.stderr)
        return False


def _report(jobs: RayJobs, job: Job, run_uri: str, *, as_json: bool, waited: bool) -> int:
    from nf_pipeline.driver.submit import exit_code_of

    exit_code = exit_code_of(job) if waited else 0
    if waited and exit_code and job.exit_code is None:
        print(f"job {job.submission_id} is {job.status}: {job.message}", file=sys.stderr)
    if as_json:
        document = {
            "submission_id": job.submission_id,
            "status": job.status,
            "address": jobs.address,
            "run": run_uri,
        }
        print(json.dumps(document | ({"exit_code": exit_code} if waited else {})))
    elif not waited:
        print(job.submission_id)
    return exit_code
