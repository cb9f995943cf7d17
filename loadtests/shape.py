"""The stages of a scenario, as locust wants them."""

from typing import ClassVar

from locust import LoadTestShape

from loadtests.scenario import Stage


class StagedShape(LoadTestShape):
    """One stage after the other; the run ends with the last."""

    abstract = True
    stages: ClassVar[tuple[Stage, ...]]

    def tick(self) -> tuple[int, float] | None:
        elapsed = self.get_run_time()
        for stage in self.stages:
            if elapsed < stage.duration:
                return stage.users, stage.spawn_rate
            elapsed -= stage.duration
        return None
