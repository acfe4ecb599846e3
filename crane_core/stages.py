"""The stages of the pipeline: what each one reads, which configuration it obeys, and its version."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from crane_core.config import RunConfig


def _whole(config: RunConfig) -> list[str]:
    return [""]


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline.

    Attributes:
        name: `<group>.<stage>`; the module `jobs.<name>` runs it.
        version: raised when the meaning of its output changes.
        inputs: stages whose artifacts it reads.
        sections: parts of `RunConfig` that decide its output.
        parts: names of the independent parts the stage is mapped over; `[""]` for a stage in one piece.
        joint_inputs, joint_sections: what a run with `train.mode=joint` reads and obeys beyond that. A staged run
            neither waits for these files nor fetches and checks them.
    """

    name: str
    version: int
    inputs: tuple[str, ...]
    sections: tuple[str, ...]
    parts: Callable[[RunConfig], list[str]] = _whole
    joint_inputs: tuple[str, ...] = ()
    joint_sections: tuple[str, ...] = ()

    def inputs_of(self, config: RunConfig) -> tuple[str, ...]:
        """Stages whose artifacts it reads in a run with this configuration."""
        return self.inputs + (self.joint_inputs if config.train.mode == "joint" else ())

    def sections_of(self, config: RunConfig) -> set[str]:
        """Parts of this configuration that decide its output."""
        return {*self.sections, *(self.joint_sections if config.train.mode == "joint" else ())}


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage("etl.interactions", 2, (), ("window", "etl")),
        Stage("etl.features", 1, ("etl.interactions",), ("features",)),
        Stage("etl.profiles", 1, ("etl.interactions", "etl.features"), ("profiles",)),
        Stage("ml.refine", 1, ("etl.interactions", "etl.features", "etl.profiles"), ("refine",)),
        Stage(
            "ml.knn", 2, ("ml.refine",), ("knn",), parts=lambda config: [str(i) for i in range(config.knn.num_shards)]
        ),
        Stage("ml.graph", 2, ("etl.interactions", "ml.refine", "ml.knn"), ("knn",)),
        Stage("ml.behaviour", 1, ("etl.interactions",), ("train",)),
        Stage(
            "ml.train",
            3,
            ("etl.interactions", "ml.refine", "ml.graph", "ml.behaviour"),
            ("train",),
            joint_inputs=("etl.features", "etl.profiles"),
            joint_sections=("refine", "knn"),
        ),
        Stage("ml.evaluate", 6, ("etl.interactions", "ml.refine", "ml.behaviour", "ml.train"), ("evaluate",)),
        Stage("ml.register", 2, ("etl.interactions", "ml.train", "ml.evaluate"), ()),
        Stage("ml.export", 3, ("etl.interactions", "ml.train"), ("export",)),
    )
}
