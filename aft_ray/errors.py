"""The exceptions of this package, as a tree. The class says what happened, the message where it did and what to do.

AftError
├── ConfigError       a setting is wrong                                   (exit 2)
├── InputError        an input file or row is wrong                        (exit 2)
│   └── InvalidSchema a JSON schema that no engine can follow
├── PromptTooLong     a prompt cannot fit the model's window               (exit 2)
├── TooManyFailures   more rows failed than the run allows                 (exit 3)
├── TrainingFailed    training ended without the work it planned           (exit 3)
├── ResumeRefused     the folder holds the work of another run              (exit 4)
├── RunInUse         another command owns the run folder                   (exit 4)
├── StorageError      a file or folder could not be read or written
├── ClusterError      the Ray cluster cannot be reached, or lost what the run needs
├── EngineError       a model engine could not answer a request
│   └── EngineDead    the engine itself is gone: no request can be answered until it is built again
├── QuorumNotMet      too few usable proposals to aggregate
└── DeadlineExceeded  the plan's deadline passed before the answer was done

Each class also inherits the built-in exception that a caller would expect, takes one message, and can be pickled,
because Ray moves exceptions between processes.
"""

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aft_ray.records import Spent


class AftError(Exception):
    """The base of every error that this package raises on purpose."""

    exit_code = 1
    spent: "Spent | None" = None
    """What was paid for before a row failed with this error. The receipt of its shard counts it."""


class ConfigError(AftError, ValueError):
    """A setting is wrong. The message names the key, the value found and the value expected."""

    exit_code = 2


class InputError(AftError, ValueError):
    """An input is wrong. The message names the file and the line or row, and says what to do."""

    exit_code = 2


class InvalidSchema(InputError):
    """A JSON schema cannot be followed. The message begins with the parameter that holds it."""


class PromptTooLong(AftError, ValueError):
    """A prompt does not fit the model's window under the length policy of the run."""

    exit_code = 2


class TooManyFailures(AftError, RuntimeError):
    """More rows failed than the run allows. The failed rows and their reasons are kept."""

    exit_code = 3


class TrainingFailed(AftError, RuntimeError):
    """Training ended without the planned steps, with a loss that is not finite, or without a valid adapter."""

    exit_code = 3


class ResumeRefused(AftError, RuntimeError):
    """The output folder holds work that was made from another configuration or from other inputs."""

    exit_code = 4


class RunInUse(AftError, RuntimeError):
    """Another command owns the run folder. The message names its host and process."""

    exit_code = 4


class StorageError(AftError, OSError):
    """A file or folder could not be read or written: the disk is full, the storage is down, access is denied."""


class ClusterError(AftError, ConnectionError):
    """The Ray cluster cannot be reached, or lost something that only it had. Finished work is kept."""


class EngineError(AftError, RuntimeError):
    """A model engine could not answer a request."""


class EngineDead(EngineError):
    """The engine is gone, for example because its process died: it answers nothing until it is built again.

    The message ends with the engine's last words. Rows that were in flight are made again by the engine that replaces
    this one.
    """


class QuorumNotMet(AftError, RuntimeError):
    """Too few usable proposals came back for an aggregation."""


class DeadlineExceeded(AftError, TimeoutError):
    """The deadline of the plan passed before the answer was complete."""


def nearest(name: object, known: Iterable[str], kind: str = "keys") -> str:
    """The end of a message about an unknown name: the most similar known name, or all of them.

    nearest("sed", ["dir", "seed"])    "did you mean 'seed'?"
    nearest("poem", ["dir", "seed"])   "known keys: dir, seed"
    """
    names = list(known)
    similar = difflib.get_close_matches(str(name), names, n=1)
    return f"did you mean '{similar[0]}'?" if similar else f"known {kind}: {', '.join(names)}"
