"""What was decided on the validation split, committed before anything may read the labels of the test split.

    model/choice-00000.json       created once, never changed

A stage that died after its choice goes on with the same one: it is found by what it was made from. When that has
changed, because more blocks were trained or others came out of a repair, another choice takes the next number. Every
choice may have looked at the test labels, so their number says how often these were of use: once, as it should be, or
more often, and then the accuracy on the test split has become a little like one on the validation split.
Knows nothing of how exits are chosen. Entries: `commit_choice`, `read_test_labels`.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from nf_pipeline.config import FORMAT_VERSION
from nf_pipeline.core.calibration import Calibration
from nf_pipeline.core.early_exit_model import EarlyExitPlan
from nf_pipeline.data.held_out import HeldOutLabels, decode_labels
from nf_pipeline.documents import read_fields
from nf_pipeline.errors import AlreadyExists, ObjectCorrupt, ObjectMissing
from nf_pipeline.storage.layout import choice_key, choice_number
from nf_pipeline.storage.manifest import ObjectInfo, StageManifest, checksum_of, read_object
from nf_pipeline.storage.sealed import read_sealed, repair_fix, seal
from nf_pipeline.storage.store import Store


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Everything that the validation split decides.

    Attributes:
        fingerprint: of what it was made from: the configuration and every block.
        ingest_checksum: content checksum of the images whose test labels it opens.
        chosen_exit: position in the list of exits.
        reason: one line for people.
        calibration: of the chosen exit's probabilities; None where nobody asks for them, or there are none.
        early_exits: how samples may leave before the chosen exit; None where exits before it are not kept.
        format_version: of this document.
    """

    fingerprint: str
    ingest_checksum: str
    chosen_exit: int
    reason: str
    calibration: Calibration | None = None
    early_exits: EarlyExitPlan | None = None
    format_version: int = FORMAT_VERSION

    @property
    def temperatures(self) -> tuple[float, ...] | None:
        """Of every exit that is kept, the chosen one last; None where their outputs are no probabilities."""
        if self.early_exits is not None:
            return self.early_exits.temperatures
        return None if self.calibration is None else (self.calibration.temperature,)

    def check(self) -> None:
        """Checks what is computed with it.

        Raises:
            ValueError: names the field.
        """
        if self.chosen_exit < 0:
            raise ValueError(f"chosen_exit: got {self.chosen_exit}, want 0 or more")
        if self.calibration is not None:
            self.calibration.check()
        if self.early_exits is not None:
            self.early_exits.check()
            if len(self.early_exits.temperatures) != self.chosen_exit + 1:
                got = f"got {len(self.early_exits.temperatures)} temperatures"
                raise ValueError(f"early_exits: {got}, want those of exits 0 to {self.chosen_exit}")


@dataclass(frozen=True, kw_only=True)
class CommittedChoice:
    """A choice that is stored.

    Attributes:
        key: where.
        choice: what it says.
        num_others: choices that were made besides, on other grounds.
    """

    key: str
    choice: Choice
    num_others: int

    @property
    def num_test_reads(self) -> int:
        """For how many choices the test split was looked at, this one included."""
        return self.num_others + 1


def find_choice(store: Store, prefix: str, fingerprint: str) -> CommittedChoice | None:
    """Returns the committed choice that was made from this, None if there is none.

    Args:
        store: of the run.
        prefix: below which choices are stored: `RunLayout.model` of a run.
        fingerprint: see `Choice`.

    Raises:
        OtherVersion: another version of this program wrote one of them.
        ObjectCorrupt: one of them is damaged.
    """
    return _find(store, _stored(store, prefix), fingerprint)


def commit_choice(store: Store, prefix: str, choice: Choice) -> CommittedChoice:
    """Stores a choice under the next number, unless one made from the same is there: then that one counts.

    Raises:
        ObjectCorrupt: an earlier choice is damaged.
    """
    # Looked through and counted is the same list: what another attempt adds in between is met as AlreadyExists.
    while (found := _find(store, stored := _stored(store, prefix), choice.fingerprint)) is None:
        number = max((number for number, _ in stored), default=-1) + 1
        with contextlib.suppress(AlreadyExists):
            store.create(choice_key(prefix, number), seal(asdict(choice)))
    return found


def choice_objects(store: Store, prefix: str) -> list[ObjectInfo]:
    """Describes all committed choices, for the manifest of the stage that made them."""
    found = []
    for _, key in _stored(store, prefix):
        data = bytes(store.get(key))
        found.append(ObjectInfo(key=key, num_bytes=len(data), checksum=checksum_of(data)))
    return found


def read_test_labels(store: Store, ingest: StageManifest, opened_by: Store, choice_key: str) -> HeldOutLabels:
    """Reads the labels of the test split: the only function that does.

    Args:
        store, ingest: the manifest of images with a test split, and where they are.
        opened_by, choice_key: the committed choice that looks at them, which is read again, and where it is.

    Raises:
        ObjectMissing: nothing was chosen yet, and until then the labels are nobody's.
        ObjectCorrupt: the choice is of other images, or the labels are damaged.
    """
    choice = _read(opened_by, choice_key)
    if choice is None:
        what = f"the labels of the test split are not read before an exit is chosen: {choice_key} is not there"
        raise ObjectMissing(what, opened_by.uri, "resume the run: it chooses first")
    if choice.ingest_checksum != ingest.content_checksum:
        got = f"got {choice.ingest_checksum}, the images have {ingest.content_checksum}"
        what = f"{choice_key} was made for other images: ingest_checksum: {got}"
        raise ObjectCorrupt(what, opened_by.uri, repair_fix(opened_by, choice_key))
    if not ingest.objects:
        raise ObjectCorrupt("the manifest of the ingested images is damaged: it names no labels", store.uri)
    stored = ingest.objects[0]
    data = read_object(store, stored)
    try:
        return decode_labels(data)
    except ValueError as error:
        what = f"object {stored.key} is damaged: {error}"
        raise ObjectCorrupt(what, store.uri, repair_fix(store, stored.key)) from None


def _find(store: Store, stored: Sequence[tuple[int, str]], fingerprint: str) -> CommittedChoice | None:
    for _, key in stored:
        choice = _read(store, key)
        if choice is not None and choice.fingerprint == fingerprint:
            return CommittedChoice(key=key, choice=choice, num_others=len(stored) - 1)
    return None


def _stored(store: Store, prefix: str) -> list[tuple[int, str]]:
    numbered = [(choice_number(key), key) for key, _ in store.list(prefix)]
    return sorted((number, key) for number, key in numbered if number is not None)


def _read(store: Store, key: str) -> Choice | None:
    document = read_sealed(store, key)
    if document is None:
        return None
    try:
        choice = read_fields(Choice, document)
        choice.check()
    except ValueError as error:
        raise ObjectCorrupt(f"{key} is no choice: {error}", store.uri, repair_fix(store, key)) from None
    return choice
