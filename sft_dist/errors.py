"""What can go wrong in a way a person can mend: each error names the value, the rule and the remedy."""

from __future__ import annotations

from typing import ClassVar, Literal


class SftDistError(Exception):
    """Base of the errors whose text is written for the user.

    `exit_code` is what the program ends with, `verdict` what the life of a job is said to have ended with.
    """

    exit_code = 1
    verdict: ClassVar[Literal["refused", "busy", "unhealthy", "diverged", "unsaved"]] = "refused"


class ConfigError(SftDistError):
    """The run file, an override or a DeepSpeed file is wrong; always raised before a process group starts."""

    exit_code = 2


class BusyError(ConfigError):
    """The run folder is in use by another process, maybe one of this run's own that outlived its machine's daemon."""

    verdict = "busy"


class DataError(SftDistError):
    """Records, shards or a tokenizer cannot be used as they are."""

    exit_code = 2


class ModelError(SftDistError):
    """The model cannot be loaded, or does not keep packed documents apart."""

    exit_code = 2


class CheckpointError(SftDistError):
    """A checkpoint is damaged, belongs to another run, or cannot be written."""

    exit_code = 3


class OtherCheckpointError(CheckpointError):
    """A checkpoint is whole, and yet not for this program or this model: an older one would not help."""


class HealthError(SftDistError):
    """A machine of the run is not fit for it, or not like the others: without it the run may go on.

    `nodes` are to be left out of the next life, by name; none where it is not clear which of them is wrong.
    """

    exit_code = 75  # EX_TEMPFAIL of sysexits.h, as after a hang
    verdict = "unhealthy"

    def __init__(self, text: str, nodes: tuple[str, ...] = ()) -> None:
        super().__init__(text)
        self.nodes = nodes


class DivergedError(SftDistError):
    """Steps whose loss or gradient is no number, and no checkpoint left to go back to; none of them reached the weights."""

    verdict = "diverged"


class UnsavedError(CheckpointError):
    """The last steps could not be written, by no fault of the run: started again where there is room, it goes on."""

    verdict = "unsaved"
