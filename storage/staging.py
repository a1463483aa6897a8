"""An artifact in the making: files in a staging folder, and a journal that says which of them are finished.

The journal's first line holds the spec and the provenance; each further line finishes a *unit* (a window, a checkpoint)
with its files' sizes and sha256 and some data of the stage's own, or drops one. A unit's files are hashed and fsynced
before its line is written and fsynced, so whatever the journal names was on disk. On resume a torn last line is cut,
units whose files do not match are dropped, and files of no unit are removed: the stage finds the state of the last
finished unit, whatever happened since. Resuming reads every finished file once, to compare its hash. Rejected: trusting
size and time (a power cut leaves files of the right size full of zeros).
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import cast

from storage import atomic
from storage.artifact import Artifact, file_names
from storage.errors import InputError
from storage.fingerprint import Json, canonical_json, seal_json, sha256_file, unseal_json
from storage.manifest import FORMAT_VERSION, FileRecord, Spec, safe_name

_JOURNAL = "journal.jsonl"


class Staging:
    """What a stage writes to; made by the artifact store under its lock.

    Args:
        place: the folder that holds the staged files and the journal; created, or taken over from an interrupted run.
        spec: the question being answered.
        provenance: of this run; work of a run with another spec or provenance is thrown away.
    """

    def __init__(self, place: Path, spec: Spec, provenance: Mapping[str, Json]):
        self.spec = spec
        self.folder = place / "files"
        self._journal = place / _JOURNAL
        self._units: dict[str, dict[str, FileRecord]] = {}
        self._data: dict[str, Mapping[str, Json]] = {}
        self._owner: dict[str, str] = {}
        self.dropped: tuple[str, ...] = ()
        """Units of the interrupted run whose files are not as they were written: their work is done again."""
        header: dict[str, Json] = {
            "format_version": FORMAT_VERSION,
            "spec": spec.to_json(),
            "provenance": provenance,
        }
        lines = _read_lines(self._journal)
        if lines and seal_json(lines[0]) == seal_json(header):
            self._take_over(lines)
        else:
            atomic.remove_tree(place)
            atomic.make_folder(place)
            atomic.replace_file(self._journal, seal_json(header) + b"\n")
        atomic.make_folder(self.folder)

    @property
    def finished(self) -> Mapping[str, Mapping[str, Json]]:
        """The data of each finished unit by its name, in the order in which they were finished."""
        return MappingProxyType(self._data)

    def path(self, name: str) -> Path:
        """Where to write the file ``name``, a relative POSIX path; its folders are created."""
        path = self.folder / safe_name(name)
        atomic.make_folder(path.parent, durable=False)  # finish() and seal() fsync it with its files
        return path

    def write_bytes(self, name: str, data: atomic.Data) -> None:
        """Writes a file; durable once its unit is finished or the artifact committed."""
        atomic.write_file(self.path(name), [data])

    def write_json(self, name: str, value: Json) -> None:
        """Writes a file of canonical JSON."""
        self.write_bytes(name, canonical_json(value))

    def finish(
        self, unit: str, files: Sequence[str] | Mapping[str, FileRecord], data: Mapping[str, Json] | None = None
    ) -> None:
        """Records that a unit of work is done: after this it survives any crash.

        Args:
            unit: its name; not finished already.
            files: names of the files it consists of, none of them part of another unit; or, where their bytes were
                hashed on the way to the disk, what they must be by name, so that they are not read again.
            data: what the stage wants to know about it when resuming, as JSON.
        """
        if unit in self._units or any(name in self._owner for name in files):
            raise InputError("a unit, or a file of it, was finished before", where=unit, found=sorted(files)[:3])
        paths = [self.folder / safe_name(name) for name in files]
        records = dict(files) if isinstance(files, Mapping) else {}
        records |= {name: _record(path) for name, path in zip(files, paths, strict=True) if name not in records}
        atomic.sync_files(paths, top=self.folder)
        line: dict[str, Json] = {
            "unit": unit,
            "files": {name: {"bytes": record.bytes, "sha256": record.sha256} for name, record in records.items()},
            "data": data or {},
        }
        self._append(line)
        self._claim(unit, records, cast("Mapping[str, Json]", json.loads(canonical_json(data or {}))))

    def adopt(self, unit: str, names: Sequence[str], artifact: Artifact) -> bool:
        """Takes a unit's files over from a committed artifact, by hard links where the file system has them.

        The caller vouches that both were made alike; here each file is read once, to compare its hash.

        Args:
            unit: its name; not finished already.
            names: of the files it consists of, the same in both.
            artifact: which has them.

        Returns:
            Whether the unit is finished now; False, and nothing was taken, where a file is not as it was committed.
        """
        records = {name: artifact.manifest.files[name] for name in names if name in artifact.manifest.files}
        if len(records) < len(names) or not _all_match(artifact.folder, records):
            return False
        for name in names:
            atomic.link_or_copy(artifact.folder / name, self.path(name))
        self.finish(unit, records)
        return True

    def discard(self, name: str) -> None:
        """Removes a file. A unit that it was part of is no longer finished, and its other files go with it."""
        unit = self._owner.get(safe_name(name))
        if unit is not None:
            self._append({"dropped": unit})
            self._drop(unit)
        atomic.remove_file(self.folder / name)

    def seal(self) -> dict[str, FileRecord]:
        """Makes everything in the folder durable and returns its files by name, sorted; the commit's first step."""
        known = {name: self._units[unit][name] for name, unit in self._owner.items()}
        names = sorted(file_names(self.folder))
        for name in names:
            if (self.folder / safe_name(name)).is_symlink():
                raise InputError("an artifact holds plain files, no links", where=self.folder / name)
        missing = known.keys() - set(names)
        if missing:
            raise InputError("files of a finished unit have gone", where=self.folder, found=sorted(missing)[:3])
        loose = [self.folder / name for name in names if name not in known]
        records = {name: known.get(name) or _record(self.folder / name) for name in names}
        atomic.sync_files(loose, top=self.folder)
        return records

    def _take_over(self, lines: Sequence[dict[str, Json]]) -> None:
        latest = _latest_lines(lines[1:])
        for unit, line in list(latest.items()):
            files = cast("Mapping[str, Mapping[str, Json]]", line["files"])
            records = {name: FileRecord.from_json(name, record) for name, record in files.items()}
            if _all_match(self.folder, records):
                self._claim(unit, records, cast("Mapping[str, Json]", line["data"]))
            else:
                del latest[unit]
                self.dropped += (unit,)
        journal = b"".join(seal_json(line) + b"\n" for line in [lines[0], *latest.values()])
        if journal != self._journal.read_bytes():
            atomic.replace_file(self._journal, journal)
        for name in sorted(file_names(self.folder)):
            if name not in self._owner:
                atomic.remove_file(self.folder / name)

    def _append(self, line: dict[str, Json]) -> None:
        atomic.append_durably(self._journal, seal_json(line) + b"\n")

    def _claim(self, unit: str, records: dict[str, FileRecord], data: Mapping[str, Json]) -> None:
        self._units[unit] = records
        self._data[unit] = data
        self._owner.update(dict.fromkeys(records, unit))

    def _drop(self, unit: str) -> None:
        del self._data[unit]
        for name in self._units.pop(unit):
            del self._owner[name]
            atomic.remove_file(self.folder / name)


def _read_lines(journal: Path) -> list[dict[str, Json]]:
    """The journal's lines up to the first that is torn, damaged or none of ours; empty where there is none."""
    if not journal.is_file():
        return []
    lines: list[dict[str, Json]] = []
    for text in journal.read_bytes().split(b"\n")[:-1]:
        try:
            line = unseal_json(text)
            if lines:
                _check_line(line)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, InputError):
            break  # what follows a damaged line is computed again
        lines.append(line)
    return lines


def _check_line(line: Mapping[str, Json]) -> None:
    """Raises where a line is none of the two kinds, or names what is no file of the folder."""
    if type(line.get("dropped")) is str:
        return
    if type(line["unit"]) is not str or not isinstance(line["data"], dict):
        raise TypeError("neither a finished unit nor a dropped one")
    for name, record in cast("Mapping[str, Mapping[str, Json]]", line["files"]).items():
        FileRecord.from_json(safe_name(name), record)


def _latest_lines(lines: Sequence[dict[str, Json]]) -> dict[str, dict[str, Json]]:
    """By unit, the line that finished it last, of units not dropped since; in the order of finishing."""
    latest: dict[str, dict[str, Json]] = {}
    for line in lines:
        if "dropped" in line:
            latest.pop(cast("str", line["dropped"]), None)
        else:
            latest[cast("str", line["unit"])] = line
    return latest


def _record(path: Path) -> FileRecord:
    if not path.is_file():
        raise InputError("a finished unit names a file that was not written", where=path)
    return FileRecord(path.stat().st_size, sha256_file(path))


def _all_match(folder: Path, records: Mapping[str, FileRecord]) -> bool:
    paths = [(folder / name, record) for name, record in records.items()]
    sizes_match = all(path.is_file() and path.stat().st_size == record.bytes for path, record in paths)
    return sizes_match and all(sha256_file(path) == record.sha256 for path, record in paths)
