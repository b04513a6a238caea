"""`ssm-zoo distill`: carry out a distillation recipe."""

from pathlib import Path
from typing import Annotated

import typer

from ..harness.processes import command_line
from .options import Output, TrustRemoteCode
from .sources import limit_waiting


def distill(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Name of a preset, or path of a YAML file.")],
    output: Output,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Replace a value of the recipe: a dotted key and a YAML value, e.g. stages.1.learning_rate=1e-3; may "
            "be repeated.",
        ),
    ] = None,
    precompute_logits: Annotated[
        bool,
        typer.Option(
            "--precompute-logits",
            help="Train nothing: write the teacher's most likely tokens for the recipe's logit distillation to OUTPUT, "
            "for runs with stored_logits=OUTPUT.",
        ),
    ] = False,
    top_k: Annotated[
        int | None, typer.Option(metavar="K", help="With --precompute-logits: tokens stored of each prediction; 64.")
    ] = None,
    plan: Annotated[
        bool | None,
        typer.Option(
            "--plan/--no-plan",
            help="Print the plan of memory and time and stop before anything is written, or make no plan; by default "
            "print it and start.",
        ),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Distil a Transformer as a recipe says. Evaluates the student before and after every stage.

    Measures and prints a plan of memory and time before it starts, and keeps it for a run that is started again.

    Several processes: accelerate launch -m ssm_zoo.cli.main distill RECIPE OUTPUT
    """
    from ..distill.recipe_files import load_recipe

    if top_k is not None and not precompute_logits:
        raise ValueError(f"--top-k has no effect without --precompute-logits. Remove it (got {top_k}).")
    if plan and precompute_logits:
        raise ValueError("--plan has no effect with --precompute-logits, which trains nothing. Remove one of them.")
    notes: list[str] = []
    checked = load_recipe(recipe, overrides or (), notes.append)
    from rich.console import Console

    from ..distill.plan import RunPlan, plan_table
    from ..distill.report import print_table
    from ..distill.run import distill as run
    from ..training.trainer import processes

    limit_waiting()
    state = processes()
    for note in notes if state.is_main_process else ():
        typer.echo(note)
    if precompute_logits:
        from ..distill.precompute import precompute_logits as precompute

        settings = precompute(
            checked, output, top_k=64 if top_k is None else top_k, trust_remote_code=trust_remote_code
        )
        typer.echo(f"{settings['top_k']} tokens of each prediction: {output}")
        return

    def on_plan(found: RunPlan) -> bool:
        if state.is_main_process:
            typer.echo(plan_table(found))
        return not plan

    command = distill_command(recipe, output, overrides or [], trust_remote_code=trust_remote_code)
    planned = None if plan is False else on_plan
    report = run(checked, output, command=command, trust_remote_code=trust_remote_code, on_plan=planned)
    if report and state.is_main_process:
        print_table(report, Console())
        typer.echo(f"report: {output / 'report.md'}   student: {output / 'student'}")


def distill_command(recipe: str, output: Path, overrides: list[str], *, trust_remote_code: bool = False) -> str:
    """Return the command line that repeats a run, for its report."""
    arguments = ["distill", recipe, str(output)]
    for override in overrides:
        arguments += ["--set", override]
    if trust_remote_code:
        arguments.append("--trust-remote-code")
    return command_line(arguments)
