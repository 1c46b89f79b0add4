"""Everything a user can get wrong, as one-line errors: what, which name, found against expected, what to do."""


class SculptorError(ValueError):
    """Base of all errors that a user can act on; the command line prints its text and exits with 1."""

    exit_code = 1


class CheckpointError(SculptorError):
    """A checkpoint that cannot be read, or that is of a kind sculptor does not handle."""


class ArchiveError(SculptorError):
    """A subspace archive that cannot be read, or that belongs to another checkpoint."""


class DataError(SculptorError):
    """A data file or row that cannot be used."""


class SettingsError(SculptorError):
    """Settings that contradict each other, are out of range, or would have no effect."""

    exit_code = 2


class OutputError(SculptorError):
    """An output that exists already, is left over from another run, or cannot be written."""


class CapacityError(SculptorError):
    """No direction is left free in any matrix."""


class TrainingError(SculptorError):
    """A run that cannot go on, for example because its loss is not finite."""


class BankError(SculptorError):
    """A bank cannot be read, or does not go with a model."""


class EditError(SculptorError):
    """Checkpoints that do not go together, or an edit that cannot be made of them."""


class VerificationError(SculptorError):
    """A verification that could not be carried out, as opposed to one that failed."""

    exit_code = 2


class Stopped(SculptorError):
    """A run that a signal stopped after its state was saved."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


class PeerError(SculptorError):
    """Another of the processes that work on one run failed; `told` if it says why itself."""

    def __init__(self, message: str, *, told: bool = False) -> None:
        super().__init__(message)
        self.told = told
