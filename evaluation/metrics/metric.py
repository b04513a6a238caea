"""The base class of the metrics."""

import importlib.util
import inspect
from typing import Any, ClassVar

import evaluate
from datasets import Features

from ...harness.extras import install_command


class ZooMetric(evaluate.Metric):
    """A metric that is defined by its class alone: nothing is downloaded, and in one process nothing is written.

    Across processes, give every process `num_process`, its own `process_id` and a common `experiment_id` and
    `cache_dir`: each adds its share, and process 0 computes the result over all of them.

    Attributes:
        INPUTS: type of every input, in the notation of `datasets.Features`; a list of such dicts for alternatives.
    """

    INPUTS: ClassVar[Any]

    def __init__(self, *, num_process: int = 1, keep_in_memory: bool | None = None, **options: Any) -> None:
        """Create an empty metric.

        Args:
            num_process: number of processes that add values.
            keep_in_memory: keep the values in memory instead of a file; None: in memory if there is one process.
            **options: further options of `evaluate.Metric`, e.g. process_id, experiment_id or cache_dir.
        """
        in_memory = num_process == 1 if keep_in_memory is None else keep_in_memory
        super().__init__(num_process=num_process, keep_in_memory=in_memory, **options)

    def compute(self, *, predictions: Any = None, references: Any = None, **inputs: Any) -> dict[str, Any]:
        """Compute the result over everything that was added, and start again.

        Args:
            predictions: added first, with the other inputs, if not None.
            references: as `predictions`.
            **inputs: further inputs. Those that the metric does not have are ignored: `evaluate.combine` passes the
                inputs of all metrics to each of them.

        Returns:
            The values by name; in a process other than the first, an empty dict.

        Raises:
            ValueError: if nothing was added.
        """
        if predictions is None and references is None and not len(self):
            raise ValueError(f"{type(self).__name__}: nothing to compute. Call add or add_batch first.")
        own = {name: value for name, value in inputs.items() if name in self._feature_names()}
        # evaluate.combine fails on the None that evaluate.Metric returns in the other processes.
        return super().compute(predictions=predictions, references=references, **own) or {}

    def _info(self) -> evaluate.MetricInfo:
        """Describe the metric to `evaluate`."""
        several = isinstance(self.INPUTS, list)
        features = [Features(inputs) for inputs in self.INPUTS] if several else Features(self.INPUTS)
        return evaluate.MetricInfo(
            description=inspect.cleandoc(type(self).__doc__ or ""),
            citation="",
            features=features,  # pyright: ignore[reportArgumentType]
        )

    def _build_data_dir(self) -> str:
        """Return the folder for the values; none is created where they are kept in memory."""
        return "" if self.keep_in_memory else super()._build_data_dir()


def require_package(module: str, package: str, metric: str) -> None:
    """Raise a ValueError if a package that a metric needs is not installed."""
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"{metric} needs the package {package}, which is not installed. {install_command('metrics')}")
