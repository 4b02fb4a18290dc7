"""The same images in every format that is read, written by the libraries that users write them with."""

import io
import os
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import numpy as np
import scipy.io
import webdataset
from PIL import Image

DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"


def files_of(folder: Path) -> dict[str, bytes]:
    """Content of each file by its path below ``folder``, in sorted order."""
    paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {path: (folder / path).read_bytes() for path in paths}


def encoded(image: Image.Image, kind: str = "JPEG") -> bytes:
    """Return ``image`` as the bytes of a file."""
    content = io.BytesIO()
    image.save(content, kind, quality=95)
    return content.getvalue()


def settle(path: Path, hours: int = 1) -> None:
    """Let an hour pass since a file or folder was changed."""
    then = os.stat(path).st_mtime - 3600 * hours
    os.utime(path, (then, then))


def write_tar(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def tar_bytes(folder: Path, files: dict[str, bytes]) -> bytes:
    return write_tar(folder / "inner.tar", files).read_bytes()


def write_tar_of_tars(path: Path, files: dict[str, bytes], scratch: Path) -> Path:
    """As ILSVRC2012_img_train.tar: one archive a class, without folders in it, the classes in no order."""
    classes = sorted({name.split("/")[0] for name in files}, key=lambda name: name[::-1])
    inner = {}
    for one in classes:
        mine = {name.split("/")[1]: content for name, content in files.items() if name.split("/")[0] == one}
        inner[f"{one}.tar"] = tar_bytes(scratch, dict(reversed(mine.items())))
    return write_tar(path, inner)


def write_shards(pattern: str, files: dict[str, bytes], classes: list[str], flat: bool = False, most: int = 5) -> None:
    """WebDataset shards of up to ``most`` samples in a shuffled order; ``flat`` keys have no class folder."""
    Path(pattern).parent.mkdir(parents=True, exist_ok=True)
    names = np.random.default_rng(0).permutation(list(files)).tolist()
    with webdataset.ShardWriter(pattern, maxcount=most, verbose=0) as writer:
        for name in names:
            key, suffix = name.rsplit(".", 1)
            number = classes.index(name.split("/")[0])
            key = key.split("/")[1] if flat else key
            writer.write({"__key__": key, suffix: files[name], "cls": number, "json": {"made by": "a test"}})


def write_parquet(
    folder: Path, split: str, files: dict[str, bytes], classes: list[str], official: bool = True, named: bool = True
) -> None:
    """Parquet files as ImageNet has them on the Hub: two of them, with the synset behind the file's name.

    Not ``named``, they have numbers alone, without the names of the classes.
    """
    label = datasets.ClassLabel(names=classes) if named else datasets.Value("int64")
    features = datasets.Features({"image": datasets.Image(), "label": label})
    names = np.random.default_rng(1).permutation(list(files)).tolist()
    rows = []
    for name in names:
        one, base = name.split("/")
        stem, suffix = base.rsplit(".", 1)
        path = f"{stem}_{one}.{suffix}" if official else base
        rows.append({"image": {"bytes": files[name], "path": path}, "label": classes.index(one)})
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for part, chosen in enumerate((rows[: len(rows) // 2], rows[len(rows) // 2 :])):
        data = datasets.Dataset.from_list(chosen, features=features)
        data.to_parquet(folder / f"data/{split}-{part:05d}-of-00002.parquet")


def write_devkit(path: Path, synsets: list[str], truth: list[str]) -> Path:
    """The development kit: ids of its own for the synsets, and above them one that is no class of the challenge."""
    ids = {synset: number + 1 for number, synset in enumerate(sorted(synsets, key=lambda name: name[::-1]))}
    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    entries = [(number, synset, "a thing, an object", 0) for synset, number in ids.items()]
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": np.array([*entries, (len(ids) + 1, "n99999999", "all", 2)], dtype=fields)})
    files = {
        "ILSVRC2012_devkit_t12/readme.txt": b"",
        "ILSVRC2012_devkit_t12/data/meta.mat": meta.getvalue(),
        "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": "".join(
            f"{ids[synset]}\n" for synset in truth
        ).encode(),
    }
    return write_tar(path, files, "w:gz")


class RangeServer(SimpleHTTPRequestHandler):
    """Serves files, and ranges of them, as object stores do."""

    def log_message(self, *_):
        pass

    def send_head(self):
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return None
        content = path.read_bytes()
        whole = len(content)
        self.send_response(206 if "Range" in self.headers else 200)
        if "Range" in self.headers:
            first, last = self.headers["Range"].removeprefix("bytes=").split("-")
            content = content[int(first) : int(last) + 1 if last else None]
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(content) - 1}/{whole}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)
        return None

    def do_GET(self):
        self.send_head()


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """Serve ``folder`` over HTTP; gives its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), lambda *words: RangeServer(*words, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
