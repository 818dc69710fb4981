"""The exceptions of this package, as a tree. The class says what happened, the message where it did and what to do.

AftError
├── ConfigError       a setting is wrong                                   (exit 2)
├── InputError        an input file or row is wrong                        (exit 2)
├── PromptTooLong     a prompt cannot fit the model's window               (exit 2)
├── TooManyFailures   more rows failed than the run allows                 (exit 3)
├── TrainingFailed    training ended without the work it planned           (exit 3)
├── ResumeRefused     the folder holds the work of another run              (exit 4)
├── EngineError       a model engine could not answer a request
├── QuorumNotMet      too few usable proposals to aggregate
└── DeadlineExceeded  the plan's deadline passed before the answer was done

Each class also inherits the built-in exception that a caller would expect, takes one message, and can be pickled,
because Ray moves exceptions between processes.
"""

import difflib
from collections.abc import Iterable


class AftError(Exception):
    """The base of every error that this package raises on purpose."""

    exit_code = 1


class ConfigError(AftError, ValueError):
    """A setting is wrong. The message names the key, the value found and the value expected."""

    exit_code = 2


class InputError(AftError, ValueError):
    """An input is wrong. The message names the file and the line or row, and says what to do."""

    exit_code = 2


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


class EngineError(AftError, RuntimeError):
    """A model engine could not answer a request."""


class QuorumNotMet(AftError, RuntimeError):
    """Too few usable proposals came back for an aggregation."""


class DeadlineExceeded(AftError, TimeoutError):
    """The deadline of the plan passed before the answer was complete."""


ERRORS: dict[str, type[AftError]] = {
    error.__name__: error
    for error in (
        ConfigError,
        InputError,
        PromptTooLong,
        TooManyFailures,
        TrainingFailed,
        ResumeRefused,
        EngineError,
        QuorumNotMet,
        DeadlineExceeded,
    )
}
"""The classes by name, to raise an error again that a worker reported as data."""


def nearest(name: object, known: Iterable[str], kind: str = "keys") -> str:
    """The end of a message about an unknown name: the most similar known name, or all of them.

    nearest("sed", ["dir", "seed"])    "did you mean 'seed'?"
    nearest("poem", ["dir", "seed"])   "known keys: dir, seed"
    """
    names = list(known)
    similar = difflib.get_close_matches(str(name), names, n=1)
    return f"did you mean '{similar[0]}'?" if similar else f"known {kind}: {', '.join(names)}"
