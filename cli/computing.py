"""Commands that compute: on processors where it pays, float32 matrix products are oneDNN's while they run."""

from typing import Any

from typer.core import TyperCommand


class ComputingCommand(TyperCommand):
    """A command that runs models. It imports torch only when it runs, after its arguments are read."""

    def invoke(self, ctx: Any) -> object:
        from ..kernels.cpu_products import fast_products

        with fast_products():
            return super().invoke(ctx)
