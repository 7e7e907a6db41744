"""MLflow. MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME and its other variables are the library's own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag

from megatron_patch.train.loggers.logger import RunOfService, numbers

_ID, _STEP = "run_id_of_all_attempts", "last_step"


class Run:
    """One run of the service through all attempts, found again by a tag: the service draws its ids itself."""

    def __init__(self, run: RunOfService) -> None:
        os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{run.folder}/mlflow.db")
        self._client = MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "mobillama")
        experiment = self._client.get_experiment_by_name(name)
        place = self._client.create_experiment(name) if experiment is None else experiment.experiment_id
        found = self._client.search_runs([place], f"tags.{_ID} = '{run.id}'", max_results=1)
        kept = found[0] if found else self._client.create_run(place, run_name=run.name, tags={_ID: run.id})
        self._id = kept.info.run_id
        self.step = int(kept.data.tags.get(_STEP, 0))
        self._client.update_run(self._id, status="RUNNING")
        if not found:
            self._client.log_batch(self._id, params=[Param(key, str(value)) for key, value in _flat(run.config)])

    def write(self, record: Mapping[str, Any]) -> None:
        when = round(record["time"] * 1000)
        metrics = [Metric(key, value, when, record["step"]) for key, value in numbers(record).items()]
        self._client.log_batch(self._id, metrics=metrics, tags=[RunTag(_STEP, str(record["step"]))])

    def close(self) -> None:
        self._client.set_terminated(self._id)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    return [
        pair
        for key, value in tree.items()
        for pair in (_flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(prefix + key, value)])
    ]
