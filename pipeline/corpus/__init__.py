"""Where documents come from: the standard library, files, folders of code, the Hub, rows of token ids.

A source says who it is (hashes of what it reads, or a pinned commit), and reads documents of one side of its train /
held-out split from any place on, so that an interrupted tokenizing goes on where it was.
"""

from functools import partial

from pipeline.config import Source
from pipeline.corpus.documents import DocumentSource, text_document, token_document
from pipeline.corpus.hub import HubFiles
from pipeline.corpus.sources import FolderSource, LocalFiles, RowSource, StandardLibrarySource


def open_source(source: Source, *, seed: int, d_vocab: int) -> DocumentSource:
    """The reader of a configured source.

    Args:
        source: which.
        seed: of the order in which modules, and files of a folder, are taken.
        d_vocab: size of the model's vocabulary, within which token ids must be.
    """
    if source.kind in {"standard-library-code", "standard-library-prose"}:
        return StandardLibrarySource("code" if source.kind == "standard-library-code" else "prose", seed)
    if source.kind == "folder":
        return FolderSource(source.name, source.files, source.suffixes, seed)
    hub = HubFiles(source.data_set, source.config, source.split, source.revision) if source.data_set else None
    files = hub or LocalFiles(source.name, source.files)
    if source.kind == "tokenized":
        return RowSource(files, source.tokens_field, partial(token_document, d_vocab=d_vocab))
    return RowSource(files, source.text_field, text_document)
